/* Without a router there is no device; what is not built says so in the documented way. */
#include "cm.h"
#include <rdma/rsocket.h>

int main(void)
{
	struct rdma_cm_id *id;
	int n = -1;

	errno = 0;
	CHECK(rdma_create_event_channel() == NULL && errno == ENODEV);
	CHECK_FAILS(rdma_create_id(NULL, &id, NULL, RDMA_PS_TCP), ENODEV);
	errno = 0;
	CHECK(rdma_get_devices(&n) == NULL && errno == ENODEV);
	CHECK_FAILS(rsocket(AF_INET, SOCK_STREAM, 0), ENODEV);
	CHECK_FAILS(rread(0, &n, sizeof(n)), EBADF);
	CHECK_FAILS((ssize_t)riowrite(0, &n, sizeof(n), 0, 0), EBADF);
	CHECK_FAILS(rdma_ack_cm_event(NULL), EINVAL);
	CHECK_FAILS(rdma_destroy_id(NULL), EINVAL);
	CHECK_FAILS(rdma_create_id(NULL, NULL, NULL, RDMA_PS_TCP), EINVAL);
	CHECK(!strcmp(rdma_event_str(RDMA_CM_EVENT_TIMEWAIT_EXIT), "RDMA_CM_EVENT_TIMEWAIT_EXIT"));
	CHECK(!strcmp(rdma_event_str(77), "UNKNOWN EVENT"));
	return 0;
}
