/* Datagram sockets: messages keep their boundaries and their senders, and what is asked of nobody fails. */
#include "rs.h"

static int bound(int *port)
{
	struct sockaddr_in at;
	socklen_t len = sizeof(at);
	int fd = rsocket(AF_INET, SOCK_DGRAM, 0);

	CHECK(fd >= 0 && rbind(fd, address("127.0.0.1", 0), sizeof(at)) == 0);
	CHECK(rgetsockname(fd, (struct sockaddr *)&at, &len) == 0);
	*port = ntohs(at.sin_port);
	return fd;
}

int main(void)
{
	static char big[8192];
	struct sockaddr_in from;
	socklen_t len = sizeof(from);
	char buf[2000];
	int port, other, server = bound(&port), third = bound(&other), client = rsocket(AF_INET, SOCK_DGRAM, 0);

	CHECK(client >= 0);
	CHECK_FAILS(rsend(client, "x", 1, 0), EDESTADDRREQ);
	CHECK_FAILS(rrecv(server, buf, 1, MSG_DONTWAIT), EAGAIN);
	CHECK_FAILS(rsendto(client, big, sizeof(big), 0, address("127.0.0.1", port), len), EMSGSIZE);
	CHECK(rsendto(client, "one", 3, 0, address("127.0.0.1", port), len) == 3);
	CHECK(rsendto(client, "four", 4, 0, address("127.0.0.1", port), len) == 4);
	CHECK(rs_ready(server, POLLIN, -1) == POLLIN);
	CHECK(rrecvfrom(server, buf, sizeof(buf), MSG_PEEK, (struct sockaddr *)&from, &len) == 3);
	CHECK(rrecvfrom(server, buf, sizeof(buf), 0, (struct sockaddr *)&from, &len) == 3 && !memcmp(buf, "one", 3));
	CHECK(len == sizeof(from) && from.sin_family == AF_INET && from.sin_addr.s_addr == htonl(INADDR_LOOPBACK));
	struct iovec room = { buf, 2 };
	struct msghdr message = { .msg_iov = &room, .msg_iovlen = 1 };
	CHECK(rrecvmsg(server, &message, 0) == 2 && message.msg_flags == MSG_TRUNC && !memcmp(buf, "fo", 2));

	/* An answer finds its way; a connected socket hears only its peer. */
	CHECK(rconnect(client, address("127.0.0.1", port), len) == 0);
	CHECK(rsendto(third, "noise", 5, 0, (struct sockaddr *)&from, len) == 5);
	CHECK(rsendto(server, "answer", 6, 0, (struct sockaddr *)&from, len) == 6);
	CHECK(rrecv(client, buf, sizeof(buf), 0) == 6 && !memcmp(buf, "answer", 6));
	CHECK(rsend(client, "again", 5, 0) == 5 && rrecv(server, buf, sizeof(buf), 0) == 5);

	/* Nobody there. */
	CHECK_FAILS(rsendto(client, "x", 1, 0, address("127.0.0.1", 9), len), ECONNREFUSED);
	CHECK_FAILS(rsendto(client, "x", 1, 0, address("192.0.2.1", 9), len), EHOSTUNREACH);
	CHECK_FAILS(rlisten(client, 1), EOPNOTSUPP);

	/* Many, with an answer each: none is lost while there are receives. */
	CHECK(rfcntl(client, F_SETFL, O_NONBLOCK) == 0);
	for (int i = 0; i < 1000; i++) {
		CHECK(rs_ready(client, POLLOUT, -1) & POLLOUT);
		while (rsend(client, &i, sizeof(i), 0) != sizeof(i))
			CHECK(errno == EAGAIN);
		int got;
		CHECK(rrecvfrom(server, &got, sizeof(got), 0, (struct sockaddr *)&from, &len) == sizeof(got) && got == i);
	}
	CHECK(rclose(server) == 0 && rclose(third) == 0 && rclose(client) == 0);
	return 0;
}
