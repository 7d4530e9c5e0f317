// Subscribes with go-zeromq/zmq4: subscribe ENDPOINT FIRST LATER...
// Prints each message as its topic and JSON. Where there is a LATER, it is asked for after 100 messages, and FIRST left after 200.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"

	"github.com/go-zeromq/zmq4"
	"github.com/vmihailenco/msgpack/v5"
)

func main() {
	endpoint, first, later := os.Args[1], os.Args[2], os.Args[3:]
	socket := zmq4.NewSub(context.Background(),
		zmq4.WithAutomaticReconnect(true), // else it is deaf for ever after the worker was restarted
		zmq4.WithDialerMaxRetries(-1))
	must(socket.Dial(endpoint))
	must(socket.SetOption(zmq4.OptionSubscribe, first))

	for count := 1; ; count++ {
		frames, err := socket.Recv()
		if err != nil { // the connection is lost; it comes back by itself
			log.Print(err)
			continue
		}
		var message map[string]any
		must(msgpack.Unmarshal(frames.Frames[1], &message))
		text, err := json.Marshal(message)
		must(err)
		fmt.Printf("%s %s\n", frames.Frames[0], text)

		if count == 100 {
			for _, prefix := range later {
				must(socket.SetOption(zmq4.OptionSubscribe, prefix))
			}
		} else if count == 200 && len(later) > 0 {
			must(socket.SetOption(zmq4.OptionUnsubscribe, first))
		}
	}
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
