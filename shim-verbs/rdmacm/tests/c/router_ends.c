/* The router goes away under a blocked reader: it hears of it, and what it has can still be given back. */
#include "cm.h"

int main(void)
{
	struct rdma_event_channel *channel = rdma_create_event_channel();
	struct rdma_cm_event *event;
	int port;
	CHECK(channel);
	struct rdma_cm_id *listen = listener(channel, RDMA_PS_TCP, &port);
	puts("ready");
	fflush(stdout);
	CHECK_FAILS(rdma_get_cm_event(channel, &event), ENODEV);
	CHECK_FAILS(rdma_listen(listen, 1), EIO);
	CHECK(rdma_destroy_id(listen) == 0);
	rdma_destroy_event_channel(channel);
	errno = 0;
	CHECK(rdma_create_event_channel() == NULL && errno == ENODEV);
	return 0;
}
