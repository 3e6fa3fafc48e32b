/* The out-of-band channel: framed messages over TCP, so that a failed case ends in both processes and the next one starts in step. */
#include "common.h"
#include "internal.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <time.h>

enum kind { SYNC = 'S', DATA = 'D', END = 'E' };
struct head {
	uint32_t len; /* of what follows */
	uint8_t kind, verdict, spare[2];
};

static int conn = -1;

static _Noreturn void broken(const char *what)
{
	printf("FAIL out-of-band: %s: %s\n", what, strerror(errno));
	_exit(4);
}

static int try_connect(const struct sockaddr_in *to)
{
	int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (s >= 0 && connect(s, (const struct sockaddr *)to, sizeof(*to))) {
		close(s);
		s = -1;
	}
	return s;
}

static void connect_to(const char *client)
{
	char host[64];
	const char *colon = strrchr(client, ':');
	struct sockaddr_in to = { .sin_family = AF_INET };
	double until = now() + 20 * patience;

	if (!colon || (size_t)(colon - client) >= sizeof(host)) {
		errno = EINVAL;
		broken("--client wants ADDR:PORT");
	}
	memcpy(host, client, (size_t)(colon - client));
	host[colon - client] = 0;
	to.sin_port = htons((uint16_t)atoi(colon + 1));
	if (inet_pton(AF_INET, host, &to.sin_addr) != 1) {
		errno = EINVAL;
		broken("--client wants an IPv4 address");
	}
	/* The server may not listen yet; there is nothing to wait on but the next try. */
	while ((conn = try_connect(&to)) < 0) {
		if (now() > until)
			broken("connect");
		nanosleep(&(struct timespec){ .tv_nsec = 20000000 }, NULL);
	}
}

static void accept_on(int port)
{
	int one = 1, s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port) };
	socklen_t len = sizeof(at);

	if (s < 0 || setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) || bind(s, (struct sockaddr *)&at, sizeof(at)) ||
	    listen(s, 1) || getsockname(s, (struct sockaddr *)&at, &len))
		broken("listen");
	printf("# listening on %d\n", ntohs(at.sin_port));
	conn = accept4(s, NULL, NULL, SOCK_CLOEXEC);
	if (conn < 0)
		broken("accept");
	close(s);
}

void oob_open(const char *client, int server_port)
{
	int one = 1;

	if (is_a && is_b)
		return;
	if (is_a)
		connect_to(client);
	else
		accept_on(server_port);
	if (setsockopt(conn, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)))
		broken("TCP_NODELAY");
}

static void put(enum kind kind, enum verdict verdict, const void *data, size_t len)
{
	struct head h = { .kind = (uint8_t)kind, .verdict = (uint8_t)verdict, .len = (uint32_t)len };

	if (send(conn, &h, sizeof(h), len ? MSG_MORE : 0) != (ssize_t)sizeof(h) || (len && send(conn, data, len, 0) != (ssize_t)len))
		broken("send");
}

static void get(void *data, size_t len)
{
	ssize_t n = len ? recv(conn, data, len, MSG_WAITALL) : 0;

	if (n != (ssize_t)len) {
		if (n >= 0)
			errno = EPIPE;
		broken("recv");
	}
}

/* An END where something else is due stays on the wire for oob_end_case. */
static void expect(enum kind kind, void *data, size_t len)
{
	struct head h;
	ssize_t n = recv(conn, &h, sizeof(h), MSG_WAITALL | MSG_PEEK);

	if (n != (ssize_t)sizeof(h)) {
		if (n >= 0)
			errno = EPIPE;
		broken("recv");
	}
	if (h.kind == END)
		end_case(h.verdict == SKIPPED ? SKIPPED : FAILED, "the case ended early in the other process");
	get(&h, sizeof(h));
	if (h.kind != kind || h.len != len)
		FAIL("out of step: expected message %c of %zu bytes, got %c of %u", kind, len, h.kind, h.len);
	get(data, len);
}

void sync_ends(void)
{
	if (conn < 0)
		return;
	put(SYNC, PASSED, NULL, 0);
	expect(SYNC, NULL, 0);
}

void swap_bytes(const void *mine, void *theirs, size_t len)
{
	put(DATA, PASSED, mine, len);
	expect(DATA, theirs, len);
}

uint64_t from_a(uint64_t value)
{
	if (conn < 0)
		return value;
	if (is_a)
		put(DATA, PASSED, &value, sizeof(value));
	else
		expect(DATA, &value, sizeof(value));
	return value;
}

uint64_t from_b(uint64_t value)
{
	if (conn < 0)
		return value;
	if (is_b)
		put(DATA, PASSED, &value, sizeof(value));
	else
		expect(DATA, &value, sizeof(value));
	return value;
}

enum verdict oob_end_case(enum verdict mine)
{
	struct head h;
	char sink[512];

	if (conn < 0)
		return PASSED;
	put(END, mine, NULL, 0);
	for (;;) {
		get(&h, sizeof(h));
		if (h.kind == END)
			return (enum verdict)h.verdict;
		for (size_t left = h.len; left;) {
			size_t n = left < sizeof(sink) ? left : sizeof(sink);

			get(sink, n);
			left -= n;
		}
	}
}

bool oob_peer_gave_up(void)
{
	struct head h;

	return conn >= 0 && recv(conn, &h, sizeof(h), MSG_PEEK | MSG_DONTWAIT) == (ssize_t)sizeof(h) && h.kind == END && h.verdict != PASSED;
}

/* A leaves last, so that whoever ends everything once A has ended (freeflow lab does) cuts nothing off at B. */
void oob_goodbye(void)
{
	char byte;

	if (conn < 0)
		return;
	fflush(stdout);
	if (is_a && recv(conn, &byte, 1, 0) != 0)
		broken("goodbye");
	close(conn);
}
