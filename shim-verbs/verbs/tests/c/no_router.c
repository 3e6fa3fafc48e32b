/* Without a router: an empty list, which is neither an error nor a word on stderr. */
#include "check.h"

int main(void)
{
	int n = -1;
	struct ibv_device **list = ibv_get_device_list(&n);
	CHECK(list != NULL);
	CHECK(n == 0 && list[0] == NULL);
	ibv_free_device_list(list);
	list = ibv_get_device_list(NULL);
	CHECK(list != NULL && list[0] == NULL);
	ibv_free_device_list(list);
	CHECK(ibv_fork_init() == 0);
	CHECK(ibv_is_fork_initialized() == IBV_FORK_UNNEEDED);
	return 0;
}
