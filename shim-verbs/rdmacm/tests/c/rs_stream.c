/* Streams: bytes arrive once and in order whatever the pieces, ends are seen, and the calls keep to their man pages. */
#include "rs.h"

enum { TOTAL = 8 << 20 };

static unsigned char pattern(size_t at)
{
	return (at * 2654435761u) >> 13;
}

/* Sends TOTAL bytes in pieces of all sizes. */
static void *sender(void *arg)
{
	int fd = *(int *)arg;
	enum { ROOM = 300000 };
	unsigned char *buf = malloc(ROOM);
	size_t at = 0, turn = 0;

	while (at < TOTAL) {
		size_t len = (turn++ * 7919) % ROOM + 1;
		if (turn % 3)
			len = len % 300 + 1;
		if (len > TOTAL - at)
			len = TOTAL - at;
		for (size_t i = 0; i < len; i++)
			buf[i] = pattern(at + i);
		CHECK(rsend(fd, buf, len, 0) == (ssize_t)len);
		at += len;
	}
	CHECK(rshutdown(fd, SHUT_WR) == 0);
	CHECK_FAILS(rsend(fd, buf, 1, 0), EPIPE);
	free(buf);
	return NULL;
}

static void *receiver(void *arg)
{
	int fd = *(int *)arg;
	unsigned char *buf = malloc(200000);
	size_t at = 0, turn = 0;
	ssize_t got;

	while ((got = rrecv(fd, buf, (turn++ * 104729) % 200000 + 1, 0)) > 0) {
		for (ssize_t i = 0; i < got; i++)
			CHECK(buf[i] == pattern(at + i));
		at += got;
	}
	CHECK(got == 0 && at == TOTAL);
	free(buf);
	return NULL;
}

/* Both directions at once, a thread for each. */
static void bytes_flow_both_ways(void)
{
	pthread_t threads[4];
	int pair[2];

	rs_pair(pair);
	for (int i = 0; i < 2; i++) {
		CHECK(pthread_create(&threads[2 * i], NULL, sender, &pair[i]) == 0);
		CHECK(pthread_create(&threads[2 * i + 1], NULL, receiver, &pair[i]) == 0);
	}
	for (int i = 0; i < 4; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	CHECK(rclose(pair[0]) == 0 && rclose(pair[1]) == 0);
}

static void small_things(void)
{
	struct sockaddr_in local, remote;
	socklen_t len = sizeof(local);
	char buf[16] = { 0 };
	int pair[2];

	rs_pair(pair);
	CHECK(rgetsockname(pair[0], (struct sockaddr *)&local, &len) == 0);
	CHECK(rgetpeername(pair[1], (struct sockaddr *)&remote, &len) == 0);
	CHECK(local.sin_port == remote.sin_port && local.sin_addr.s_addr == remote.sin_addr.s_addr);
	len = 0;
	CHECK(rgetsockname(pair[0], NULL, &len) == 0 && len == sizeof(local));

	CHECK(rs_ready(pair[1], POLLIN | POLLOUT, 0) == POLLOUT);
	CHECK_FAILS(rrecv(pair[1], buf, 16, MSG_DONTWAIT), EAGAIN);
	CHECK(rsend(pair[0], "hello", 5, 0) == 5);
	CHECK(rs_ready(pair[1], POLLIN, -1) == POLLIN);
	CHECK(rrecv(pair[1], buf, 16, MSG_PEEK) == 5 && !memcmp(buf, "hello", 5));
	CHECK(rrecv(pair[1], buf, 2, 0) == 2);
	CHECK(rread(pair[1], buf, 16) == 3 && !memcmp(buf, "llo", 3));

	struct iovec out[3] = { { "ab", 2 }, { "", 0 }, { "cdef", 4 } };
	char first[3], second[8];
	struct iovec in[2] = { { first, 3 }, { second, 8 } };
	struct msghdr message = { .msg_iov = in, .msg_iovlen = 2 };
	CHECK(rwritev(pair[1], out, 3) == 6);
	CHECK(rs_ready(pair[0], POLLIN, -1) == POLLIN);
	CHECK(rrecvmsg(pair[0], &message, 0) == 6);
	CHECK(!memcmp(first, "abc", 3) && !memcmp(second, "def", 3));
	message.msg_iov = out;
	message.msg_iovlen = 3;
	CHECK(rsendmsg(pair[1], &message, MSG_NOSIGNAL) == 6);
	CHECK(rrecv(pair[0], buf, 6, MSG_WAITALL) == 6);
	CHECK_FAILS(rsend(pair[0], "!", 1, MSG_OOB), EOPNOTSUPP);

	struct timeval soon = { .tv_usec = 10000 };
	CHECK(rsetsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &soon, sizeof(soon)) == 0);
	CHECK_FAILS(rrecv(pair[0], buf, 1, 0), EAGAIN);
	CHECK(rclose(pair[0]) == 0);
	CHECK(rs_ready(pair[1], POLLIN, -1) & POLLIN);
	CHECK(rrecv(pair[1], buf, 1, 0) == 0);
	CHECK(rclose(pair[1]) == 0);
	CHECK_FAILS(rclose(pair[1]), EBADF);
	CHECK_FAILS(rrecv(pair[1], buf, 1, 0), EBADF);
}

/* What was sent before the close arrives, also when nobody had read any of it. */
static void data_before_a_close(void)
{
	static char out[100000], in[100000];
	int pair[2];

	rs_pair(pair);
	memset(out, 'z', sizeof(out));
	CHECK(rsend(pair[0], out, sizeof(out), 0) == sizeof(out));
	CHECK(rclose(pair[0]) == 0);
	CHECK(rrecv(pair[1], in, sizeof(in), MSG_WAITALL) == sizeof(in));
	CHECK(!memcmp(in, out, sizeof(in)));
	CHECK(rrecv(pair[1], in, 1, 0) == 0);
	/* The peer is gone: sooner or later sending fails. */
	CHECK(rs_ready(pair[1], POLLHUP, -1) & POLLHUP);
	errno = 0;
	CHECK(rsend(pair[1], out, 1, 0) == -1 && (errno == EPIPE || errno == ECONNRESET));
	CHECK(rclose(pair[1]) == 0);
}

/* A full stream takes no more until its reader reads. */
static void a_full_stream(void)
{
	static char buf[65536];
	size_t sent = 0, got = 0;
	ssize_t n;
	int pair[2];

	rs_pair(pair);
	CHECK(rfcntl(pair[0], F_SETFL, O_NONBLOCK) == 0 && rfcntl(pair[0], F_GETFL) & O_NONBLOCK);
	while ((n = rsend(pair[0], buf, sizeof(buf), 0)) > 0)
		sent += n;
	CHECK(n == -1 && errno == EAGAIN && sent >= 65536);
	CHECK(rs_ready(pair[0], POLLOUT, 0) == 0);
	while (got < sent) {
		n = rrecv(pair[1], buf, sizeof(buf), 0);
		CHECK(n > 0);
		got += n;
	}
	CHECK(rs_ready(pair[0], POLLOUT, -1) == POLLOUT);
	CHECK(rsend(pair[0], buf, 1, 0) == 1);
	CHECK(rclose(pair[0]) == 0 && rclose(pair[1]) == 0);
}

static void connecting(void)
{
	struct sockaddr_in peer;
	socklen_t len = sizeof(peer);
	int port, error = -1, fd = rsocket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

	/* Nobody listens; the same socket may try again. */
	CHECK(fd >= 0);
	CHECK(rs_ready(fd, POLLOUT, 0) == (POLLOUT | POLLHUP));
	CHECK_FAILS(rgetpeername(fd, (struct sockaddr *)&peer, &len), ENOTCONN);
	CHECK_FAILS(rsend(fd, "x", 1, 0), ENOTCONN);
	CHECK(rconnect(fd, address("127.0.0.1", 9), sizeof(peer)) == -1);
	if (errno == EINPROGRESS) {
		CHECK(rs_ready(fd, POLLOUT, -1) & POLLERR);
		len = sizeof(error);
		CHECK(rgetsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len) == 0);
	} else {
		error = errno;
	}
	CHECK(error == ECONNREFUSED);

	int listener = rs_listener(&port);
	CHECK(rconnect(fd, address("127.0.0.1", port), sizeof(peer)) == -1 && errno == EINPROGRESS);
	CHECK(rs_ready(fd, POLLOUT, -1) == POLLOUT);
	len = sizeof(error);
	CHECK(rgetsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len) == 0 && error == 0);
	CHECK_FAILS(rconnect(fd, address("127.0.0.1", port), sizeof(peer)), EISCONN);
	CHECK(rs_ready(listener, POLLIN, -1) == POLLIN);
	len = sizeof(peer);
	int child = raccept(listener, (struct sockaddr *)&peer, &len);
	CHECK(child >= 0 && peer.sin_family == AF_INET && len == sizeof(peer));
	CHECK(rfcntl(listener, F_SETFL, O_NONBLOCK) == 0);
	CHECK_FAILS(raccept(listener, NULL, NULL), EAGAIN);
	/* A connection that nobody accepted ends with its listener. */
	int second = rsocket(AF_INET, SOCK_STREAM, 0);
	CHECK(rconnect(second, address("127.0.0.1", port), sizeof(peer)) == 0);
	CHECK(rclose(listener) == 0);
	char byte;
	CHECK(rrecv(second, &byte, 1, 0) == 0);
	CHECK(rclose(fd) == 0 && rclose(child) == 0 && rclose(second) == 0);
	CHECK_FAILS(rsocket(AF_UNIX, SOCK_STREAM, 0), EAFNOSUPPORT);
	CHECK_FAILS(rsocket(AF_INET, SOCK_RAW, 0), EPROTONOSUPPORT);
}

static void options(void)
{
	int value, pair[2], fd = rsocket(AF_INET6, SOCK_STREAM, 0);
	socklen_t len = sizeof(value);

	for (int on = 1; on >= 0; on--) {
		CHECK(rsetsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) == 0);
		CHECK(rgetsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &value, &len) == 0 && value == on);
		CHECK(rsetsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof(on)) == 0);
		CHECK(rgetsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &value, &len) == 0 && value == on);
	}
	value = 100000;
	CHECK(rsetsockopt(fd, SOL_SOCKET, SO_RCVBUF, &value, sizeof(value)) == 0);
	CHECK(rgetsockopt(fd, SOL_SOCKET, SO_RCVBUF, &value, &len) == 0 && value >= 100000);
	value = 64;
	CHECK(rsetsockopt(fd, SOL_RDMA, RDMA_SQSIZE, &value, sizeof(value)) == 0);
	CHECK(rgetsockopt(fd, SOL_RDMA, RDMA_SQSIZE, &value, &len) == 0 && value == 64);
	CHECK_FAILS(rsetsockopt(fd, SOL_RDMA, RDMA_SQSIZE, &value, 2), EINVAL);
	rs_pair(pair);
	CHECK_FAILS(rsetsockopt(pair[0], SOL_RDMA, RDMA_SQSIZE, &value, sizeof(value)), EINVAL);
	CHECK_FAILS(rsetsockopt(fd, SOL_SOCKET, 12345, &value, sizeof(value)), EOPNOTSUPP);
	CHECK_FAILS(rgetsockopt(fd, SOL_SOCKET, 12345, &value, &len), EOPNOTSUPP);
	CHECK_FAILS(rfcntl(fd, F_GETLK, 0), EOPNOTSUPP);
	CHECK(rfcntl(fd, F_SETFD, FD_CLOEXEC) == 0 && rfcntl(fd, F_GETFD) == FD_CLOEXEC);
	CHECK(rclose(fd) == 0 && rclose(pair[0]) == 0 && rclose(pair[1]) == 0);
}

/* One thread waits in rpoll for what another one's call takes out of the completion queue. */
static void *wait_for_room(void *arg)
{
	CHECK(rs_ready(*(int *)arg, POLLOUT, -1) == POLLOUT);
	return NULL;
}

static void waiters_of_one_socket(void)
{
	static char buf[65536];
	pthread_t waiter;
	int pair[2];
	ssize_t n;

	rs_pair(pair);
	for (int round = 0; round < 200; round++) {
		size_t sent = 0;
		while ((n = rsend(pair[0], buf, sizeof(buf), MSG_DONTWAIT)) > 0)
			sent += n;
		CHECK(pthread_create(&waiter, NULL, wait_for_room, &pair[0]) == 0);
		/* The credits come with a byte that this thread waits for. */
		CHECK(rrecv(pair[1], buf, sizeof(buf), 0) > 0);
		for (size_t got = sizeof(buf); got < sent; got += n)
			CHECK((n = rrecv(pair[1], buf, sizeof(buf), MSG_DONTWAIT)) > 0 || errno == EAGAIN || (n = sent));
		CHECK(rsend(pair[1], "x", 1, 0) == 1);
		CHECK(rrecv(pair[0], buf, 1, 0) == 1);
		CHECK(pthread_join(waiter, NULL) == 0);
		while (rrecv(pair[1], buf, sizeof(buf), MSG_DONTWAIT) > 0)
			;
	}
	CHECK(rclose(pair[0]) == 0 && rclose(pair[1]) == 0);
}

/* rpoll and rselect take other descriptors, too. */
static void mixed_descriptors(void)
{
	int pair[2], pipes[2];
	char byte;
	fd_set reads, writes;

	rs_pair(pair);
	CHECK(pipe(pipes) == 0);
	struct pollfd fds[3] = { { pair[0], POLLIN, 0 }, { pipes[0], POLLIN, 0 }, { -1, POLLIN, 0 } };
	CHECK(rpoll(fds, 3, 0) == 0);
	CHECK(write(pipes[1], "x", 1) == 1);
	CHECK(rpoll(fds, 3, -1) == 1 && fds[0].revents == 0 && fds[1].revents == POLLIN);
	CHECK(read(pipes[0], &byte, 1) == 1);
	CHECK(rsend(pair[1], "y", 1, 0) == 1);
	CHECK(rpoll(fds, 3, -1) == 1 && fds[0].revents == POLLIN);

	FD_ZERO(&reads);
	FD_ZERO(&writes);
	FD_SET(pair[0], &reads);
	FD_SET(pipes[0], &reads);
	FD_SET(pipes[1], &writes);
	int last = (pair[0] > pipes[1] ? pair[0] : pipes[1]) + 1;
	CHECK(rselect(last, &reads, &writes, NULL, NULL) == 2);
	CHECK(FD_ISSET(pair[0], &reads) && !FD_ISSET(pipes[0], &reads) && FD_ISSET(pipes[1], &writes));
	struct timeval none = { 0 };
	CHECK(rrecv(pair[0], &byte, 1, 0) == 1);
	FD_SET(pair[0], &reads);
	CHECK(rselect(last, &reads, NULL, NULL, &none) == 0 && !FD_ISSET(pair[0], &reads));
	CHECK(rclose(pair[0]) == 0 && rclose(pair[1]) == 0);
	close(pipes[0]);
	close(pipes[1]);
}

int main(void)
{
	small_things();
	connecting();
	options();
	data_before_a_close();
	a_full_stream();
	mixed_descriptors();
	waiters_of_one_socket();
	bytes_flow_both_ways();
	return 0;
}
