/* perftest uses the ibv_wr_* interface only with devices in its table. Preloaded, this gives the device a number from that
 * table (ConnectX-5) and changes nothing else. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <infiniband/verbs.h>

int ibv_query_device(struct ibv_context *context, struct ibv_device_attr *attr)
{
	int (*real)(struct ibv_context *, struct ibv_device_attr *) = dlsym(RTLD_NEXT, "ibv_query_device");
	int error = real(context, attr);
	attr->vendor_id = 0x02c9;
	attr->vendor_part_id = 4119;
	return error;
}
