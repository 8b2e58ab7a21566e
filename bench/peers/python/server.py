"""An echo server on Python's standard library: socketserver, with a thread per connection."""

import resource
import socket
import socketserver
import sys


class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        try:
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := self.request.recv(65536):
                self.request.sendall(data)
        except OSError:
            pass  # the client is gone


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 4096  # the default is 5


def main():
    # As many open files as allowed, as in Go programs.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    host, port = sys.argv[1].rsplit(":", 1)
    try:
        server = Server((host, int(port)), Echo)
    except OSError as e:
        sys.exit(f"listen {sys.argv[1]}: {e}")
    server.serve_forever()


main()
