import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import org.msgpack.jackson.dataformat.MessagePackFactory;
import org.zeromq.SocketType;
import org.zeromq.ZContext;

/**
 * Subscribes with JeroMQ: Subscribe ENDPOINT FIRST LATER...
 * Prints each message as its topic and JSON. Where there is a LATER, it is asked for after 100 messages, and FIRST left after 200.
 */
public class Subscribe {
    public static void main(String[] arguments) throws Exception {
        String endpoint = arguments[0], first = arguments[1];
        var unpack = new ObjectMapper(new MessagePackFactory());
        try (var context = new ZContext(); var socket = context.createSocket(SocketType.SUB)) {
            socket.setSndHWM(0); // else of more than 1,000 prefixes at once some are dropped
            socket.connect(endpoint);
            socket.subscribe(first);

            for (int count = 1; ; count++) {
                String topic = socket.recvStr();
                JsonNode message = unpack.readTree(socket.recv());
                System.out.println(topic + " " + message);

                if (count == 100) {
                    for (int at = 2; at < arguments.length; at++) {
                        socket.subscribe(arguments[at]);
                    }
                } else if (count == 200 && arguments.length > 2) {
                    socket.unsubscribe(first);
                }
            }
        }
    }
}
