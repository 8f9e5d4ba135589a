"""Standard input and output to a port of this machine and back: what ssh calls a proxy command. relay.py PORT"""

import os
import socket
import sys
import threading


def main(port: int) -> None:
    link = socket.create_connection(("127.0.0.1", port))
    threading.Thread(target=send, args=(link,), daemon=True).start()
    # Ends when the server closes: ssh must not wait for its own input to end.
    while chunk := link.recv(65536):
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()


def send(link: socket.socket) -> None:
    while chunk := os.read(0, 65536):
        link.sendall(chunk)
    link.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    main(int(sys.argv[1]))
