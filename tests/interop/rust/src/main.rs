//! Subscribes with the crate `zeromq`: subscribe ENDPOINT FIRST LATER...
//! Prints each message as its topic and JSON. Where there is a LATER, it is asked for after 100 messages, and FIRST left after 200.

use std::{env, error::Error, str};
use zeromq::{Socket, SocketRecv, SubSocket};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [endpoint, first, later @ ..] = arguments.as_slice() else {
        return Err("subscribe ENDPOINT FIRST LATER...".into());
    };
    let mut socket = SubSocket::new();
    socket.connect(endpoint).await?;
    socket.subscribe(first).await?;

    let mut count = 0;
    loop {
        let frames = match socket.recv().await {
            Ok(frames) => frames.into_vec(),
            Err(error) => {
                eprintln!("{error}"); // the connection is lost; it comes back by itself
                continue;
            }
        };
        let topic = str::from_utf8(&frames[0])?;
        let message: serde_json::Value = rmp_serde::from_slice(&frames[1])?;
        println!("{topic} {message}");

        count += 1;
        if count == 100 {
            for prefix in later {
                socket.subscribe(prefix).await?;
            }
        } else if count == 200 && !later.is_empty() {
            socket.unsubscribe(first).await?;
        }
    }
}
