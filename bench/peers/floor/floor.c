// The floor: the cost of an echo and nothing else. One thread, one epoll instance, one buffer for all connections. A small message
// costs one epoll_wait, one read and one write.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <unistd.h>

enum {
	BUF = 512 << 10, // bytes: the fastest for messages of 1 MiB, of 64 KiB to 1 MiB
	TURN = 16,       // reads on one connection before the others get their turn
	EVENTS = 512,
	MAX_FDS = 1 << 20,
	EDGE = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLPRI | EPOLLET,
	BROKEN = EPOLLERR | EPOLLHUP,
};

// Bytes that the kernel did not take yet; data is NULL if there are none.
struct rest {
	char *data;
	size_t off, len;
};

static char buf[BUF];
static struct rest rests[MAX_FDS]; // by fd
static int ep;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void drop(int fd)
{
	free(rests[fd].data);
	rests[fd].data = NULL;
	close(fd);
}

// Writes fd's rest. Returns 1 if nothing is left, 0 if the kernel takes no more, -1 if fd is broken.
static int flush(int fd)
{
	struct rest *r = &rests[fd];
	ssize_t n = write(fd, r->data + r->off, r->len - r->off);
	if (n < 0)
		return errno == EAGAIN ? 0 : -1;
	r->off += n;
	if (r->off < r->len)
		return 0;
	free(r->data);
	r->data = NULL;
	return 1;
}

// Writes n bytes of buf, and keeps what the kernel does not take as fd's rest. Returns the same as flush.
static int send_buf(int fd, ssize_t n)
{
	ssize_t sent = write(fd, buf, n);
	if (sent == n)
		return 1;
	if (sent < 0) {
		if (errno != EAGAIN)
			return -1;
		sent = 0;
	}
	struct rest *r = &rests[fd];
	r->off = 0;
	r->len = n - sent;
	r->data = malloc(r->len);
	if (!r->data)
		return -1;
	memcpy(r->data, buf + sent, r->len);
	return 0;
}

// Handles an edge-triggered event. It has the whole state of fd, so nothing needs to be kept while reading is suspended.
static void serve(int fd, unsigned events)
{
	int ok = 1;
	if (rests[fd].data) {
		if (!(events & (EPOLLOUT | BROKEN)))
			return;
		ok = flush(fd);
	}
	if (ok == 1 && !(events & (EPOLLIN | EPOLLRDHUP | EPOLLPRI | BROKEN)))
		return;
	// A short read has emptied the socket, and more data is another event, unless the read stopped at an urgent byte or the end of
	// the stream.
	int to_the_end = events & (EPOLLRDHUP | EPOLLPRI | BROKEN);
	for (int i = 0; ok == 1; i++) {
		if (i == TURN) {
			struct epoll_event again = {.events = EDGE, .data.fd = fd};
			if (epoll_ctl(ep, EPOLL_CTL_MOD, fd, &again) == 0) // causes another event
				return;
			break;
		}
		ssize_t n = read(fd, buf, BUF);
		if (n < 0 && errno == EAGAIN)
			return;
		if (n <= 0)
			break;
		ok = send_buf(fd, n);
		if (ok == 1 && n < BUF && !to_the_end)
			return;
	}
	if (ok)
		drop(fd);
}

static void accept_all(int ln)
{
	for (;;) {
		int fd = accept4(ln, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
		if (fd < 0) {
			if (errno == ECONNABORTED || errno == EINTR)
				continue;
			return;
		}
		struct epoll_event ev = {.events = EDGE, .data.fd = fd};
		if (fd >= MAX_FDS || epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev) < 0)
			close(fd);
	}
}

static int listen_on(const char *address)
{
	struct sockaddr_in sa = {.sin_family = AF_INET};
	char host[INET_ADDRSTRLEN] = "";
	const char *colon = strrchr(address, ':');
	if (colon && (size_t)(colon - address) < sizeof host) {
		memcpy(host, address, colon - address);
		sa.sin_port = htons(atoi(colon + 1));
	}
	if (inet_pton(AF_INET, host, &sa.sin_addr) != 1) {
		fprintf(stderr, "not an IPv4 address with a port: %s\n", address);
		exit(1);
	}
	int on = 1, ln = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (ln < 0)
		die("socket");
	setsockopt(ln, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	setsockopt(ln, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); // accepted sockets inherit it
	if (bind(ln, (struct sockaddr *)&sa, sizeof sa) < 0 || listen(ln, 4096) < 0)
		die(address);
	return ln;
}

int main(int argc, char **argv)
{
	if (argc != 2) {
		fprintf(stderr, "usage: %s host:port\n", argv[0]);
		return 1;
	}
	signal(SIGPIPE, SIG_IGN);
	struct rlimit files; // as many as allowed, as in Go programs
	if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
		files.rlim_cur = files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &files);
	}

	int ln = listen_on(argv[1]);
	ep = epoll_create1(EPOLL_CLOEXEC);
	// Level-triggered, so that clients that wait for a free file descriptor are accepted later.
	struct epoll_event ev = {.events = EPOLLIN, .data.fd = ln};
	if (ep < 0 || epoll_ctl(ep, EPOLL_CTL_ADD, ln, &ev) < 0)
		die("epoll");

	static struct epoll_event events[EVENTS];
	for (;;) {
		int n = epoll_wait(ep, events, EVENTS, -1);
		if (n < 0 && errno != EINTR)
			die("epoll_wait");
		for (int i = 0; i < n; i++) {
			if (events[i].data.fd == ln)
				accept_all(ln);
			else
				serve(events[i].data.fd, events[i].events);
		}
	}
}
