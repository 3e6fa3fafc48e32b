/* riomap and riowrite: the peer's bytes appear in mapped buffers, and only there. */
#include "rs.h"

static void wait_for(volatile char *byte, char value)
{
	while (*byte != value)
		;
}

int main(void)
{
	static char near[8192], far[300000], source[300000];
	int port, mappings = 2, pair[2], listener = rsocket(AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in at;
	socklen_t len = sizeof(at);

	CHECK(rsetsockopt(listener, SOL_RDMA, RDMA_IOMAPSIZE, &mappings, sizeof(mappings)) == 0);
	CHECK(rbind(listener, address("127.0.0.1", 0), sizeof(at)) == 0 && rlisten(listener, 1) == 0);
	CHECK(rgetsockname(listener, (struct sockaddr *)&at, &len) == 0);
	port = ntohs(at.sin_port);
	pair[0] = rsocket(AF_INET, SOCK_STREAM, 0);
	CHECK_FAILS(riomap(pair[0], near, sizeof(near), PROT_WRITE, 0, 0), ENOTCONN);
	CHECK(rconnect(pair[0], address("127.0.0.1", port), sizeof(at)) == 0);
	pair[1] = raccept(listener, NULL, NULL);
	CHECK(pair[1] >= 0);

	/* The listener's end has a table of two; the other one has none, so nothing can be announced to it. */
	CHECK_FAILS(riomap(pair[1], near, sizeof(near), PROT_WRITE, 0, 0), ENOMEM);
	CHECK_FAILS(riomap(pair[0], near, sizeof(near), PROT_READ, 0, 0), EINVAL);
	CHECK_FAILS(riomap(pair[0], NULL, 4, PROT_WRITE, 0, 0), EINVAL);
	CHECK(riomap(pair[0], near, sizeof(near), PROT_WRITE, 0, 1000) == 1000);
	CHECK(riomap(pair[0], far, sizeof(far), PROT_WRITE, 0, -1) == (off_t)(uintptr_t)far);
	CHECK_FAILS(riomap(pair[0], source, 1, PROT_WRITE, 0, 0), ENOMEM);
	/* What is announced is there before data that is sent afterwards. */
	CHECK(rsend(pair[0], "", 1, 0) == 1 && rrecv(pair[1], source, 1, 0) == 1);

	memset(source, 'q', sizeof(source));
	source[sizeof(source) - 1] = 'e';
	CHECK(riowrite(pair[1], source, 100, 1000 + 50, 0) == 100);
	CHECK(riowrite(pair[1], source, sizeof(source), (off_t)(uintptr_t)far, 0) == sizeof(source));
	wait_for(&far[sizeof(far) - 1], 'e');
	CHECK(!memcmp(far, source, sizeof(far)));
	CHECK(near[49] == 0 && near[50] == 'q' && near[149] == 'q' && near[150] == 0);
	/* Past the end nothing is mapped: what was before it is written. */
	CHECK(riowrite(pair[1], source, 100, 1000 + sizeof(near) - 10, 0) == 10);
	CHECK_FAILS((ssize_t)riowrite(pair[1], source, 1, 999, 0), EINVAL);
	CHECK_FAILS((ssize_t)riowrite(pair[0], source, 1, 1000, 0), EINVAL);

	CHECK(riounmap(pair[0], near, sizeof(near)) == 0);
	CHECK_FAILS(riounmap(pair[0], near, sizeof(near)), EINVAL);
	CHECK(rsend(pair[0], "", 1, 0) == 1 && rrecv(pair[1], source, 1, 0) == 1);
	CHECK_FAILS((ssize_t)riowrite(pair[1], source, 1, 1000, 0), EINVAL);
	CHECK(rclose(pair[0]) == 0 && rclose(pair[1]) == 0 && rclose(listener) == 0);
	return 0;
}
