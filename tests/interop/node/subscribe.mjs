// Subscribes with zeromq (libzmq inside): subscribe.mjs ENDPOINT FIRST LATER...
// Prints each message as its topic and JSON. Where there is a LATER, it is asked for after 100 messages, and FIRST left after 200.
import { decode } from "@msgpack/msgpack"
import { Subscriber } from "zeromq"

const [endpoint, first, ...later] = process.argv.slice(2)
const socket = new Subscriber()
socket.connect(endpoint)
socket.subscribe(first)

let count = 0
for await (const [topic, payload] of socket) {
  const message = decode(payload, { useBigInt64: true }) // the times need 64 bits, for which JSON has no notation here
  const text = JSON.stringify(message, (_, value) => (typeof value === "bigint" ? `${value}n` : value))
  console.log(`${topic} ${text.replace(/"(\d+)n"/g, "$1")}`)

  count += 1
  if (later.length && count === 100) socket.subscribe(...later)
  if (later.length && count === 200) socket.unsubscribe(first)
}
