/* Shared by the rsocket programs: a listener, a connected pair, checks. */
#ifndef RS_H
#define RS_H
#include "cm.h"
#include <rdma/rsocket.h>
#include <netinet/tcp.h>
#include <sys/uio.h>

/* A listening stream socket on a port of the router's choice. */
static inline int rs_listener(int *port)
{
	struct sockaddr_in at;
	socklen_t len = sizeof(at);
	int fd = rsocket(AF_INET, SOCK_STREAM, 0);

	CHECK(fd >= 0);
	CHECK(rbind(fd, address("0.0.0.0", 0), sizeof(at)) == 0);
	CHECK(rlisten(fd, 8) == 0);
	CHECK(rgetsockname(fd, (struct sockaddr *)&at, &len) == 0 && len == sizeof(at));
	*port = ntohs(at.sin_port);
	CHECK(*port >= 1024);
	return fd;
}

/* Two connected sockets. A listener answers by itself, so that one thread can do both. */
static inline void rs_pair(int pair[2])
{
	int port, listener = rs_listener(&port);

	pair[0] = rsocket(AF_INET, SOCK_STREAM, 0);
	CHECK(pair[0] >= 0);
	CHECK(rconnect(pair[0], address("127.0.0.1", port), sizeof(struct sockaddr_in)) == 0);
	pair[1] = raccept(listener, NULL, NULL);
	CHECK(pair[1] >= 0);
	CHECK(rclose(listener) == 0);
}

static inline short rs_ready(int fd, short events, int timeout)
{
	struct pollfd p = { .fd = fd, .events = events };
	int ready = rpoll(&p, 1, timeout);

	CHECK(ready >= 0 && ready == (p.revents != 0));
	return p.revents;
}
#endif
