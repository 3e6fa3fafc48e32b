/* Channels, binding, options, resolving: one process, no connection. */
#include "cm.h"
#include <ifaddrs.h>
#include <net/if.h>
#include <sys/un.h>

static struct rdma_event_channel *channel;

static struct rdma_cm_id *new_id(void)
{
	struct rdma_cm_id *id;
	CHECK(rdma_create_id(channel, &id, (void *)0x1234, RDMA_PS_TCP) == 0);
	CHECK(id->channel == channel && id->context == (void *)0x1234 && id->ps == RDMA_PS_TCP);
	CHECK(id->qp_type == IBV_QPT_RC && !id->verbs && !id->pd && !id->qp && !id->event);
	return id;
}

static void the_channel_obeys_its_flags(void)
{
	struct rdma_cm_event *event;
	CHECK(fcntl(channel->fd, F_SETFL, O_NONBLOCK) == 0);
	CHECK(!is_readable(channel->fd));
	CHECK_FAILS(rdma_get_cm_event(channel, &event), EAGAIN);
	CHECK(fcntl(channel->fd, F_SETFL, 0) == 0);
}

static void ports_and_addresses(void)
{
	struct rdma_cm_id *a = new_id(), *b = new_id(), *c = new_id();
	struct sockaddr_un other = { .sun_family = AF_UNIX };

	CHECK(rdma_get_src_port(a) == 0 && rdma_get_dst_port(a) == 0);
	CHECK_FAILS(rdma_bind_addr(a, NULL), EINVAL);
	CHECK_FAILS(rdma_bind_addr(a, (struct sockaddr *)&other), EINVAL);
	CHECK_FAILS(rdma_bind_addr(a, address("198.51.100.77", 0)), EADDRNOTAVAIL);
	CHECK(rdma_bind_addr(a, address("127.0.0.1", 0)) == 0);
	/* Which device loopback means is left open. */
	CHECK(!a->verbs && !a->pd);
	int port = ntohs(rdma_get_src_port(a));
	struct sockaddr_in *local = (struct sockaddr_in *)rdma_get_local_addr(a);
	CHECK(port >= 1024 && local->sin_family == AF_INET && local->sin_addr.s_addr == htonl(INADDR_LOOPBACK));
	CHECK_FAILS(rdma_bind_addr(a, address("127.0.0.1", 0)), EINVAL);
	CHECK_FAILS(rdma_bind_addr(b, address("127.0.0.1", port)), EADDRINUSE);
	CHECK_FAILS(rdma_bind_addr(b, address("0.0.0.0", port)), EADDRINUSE);
	CHECK(rdma_bind_addr(b, address("0.0.0.0", 0)) == 0);
	CHECK(!b->verbs);
	CHECK(rdma_listen(b, 0) == 0);
	CHECK_FAILS(rdma_listen(b, 0), EINVAL);
	CHECK(rdma_listen(c, 1) == 0 && rdma_get_src_port(c) != 0);
	CHECK(rdma_destroy_id(a) == 0);
	CHECK(rdma_destroy_id(b) == 0);
	CHECK(rdma_destroy_id(c) == 0);
	a = new_id();
	CHECK(rdma_bind_addr(a, address("127.0.0.1", port)) == 0);
	CHECK(rdma_destroy_id(a) == 0);
}

static void a_wildcard_of_both_families(void)
{
	struct rdma_cm_id *six = new_id(), *four = new_id();
	struct sockaddr_in6 any = { .sin6_family = AF_INET6 };
	int yes = 1;

	CHECK(rdma_bind_addr(six, (struct sockaddr *)&any) == 0);
	int port = ntohs(rdma_get_src_port(six));
	CHECK_FAILS(rdma_bind_addr(four, address("0.0.0.0", port)), EADDRINUSE);
	CHECK(rdma_destroy_id(six) == 0);
	six = new_id();
	any.sin6_port = htons(port);
	CHECK(rdma_set_option(six, RDMA_OPTION_ID, RDMA_OPTION_ID_AFONLY, &yes, sizeof(yes)) == 0);
	CHECK(rdma_bind_addr(six, (struct sockaddr *)&any) == 0);
	CHECK(rdma_bind_addr(four, address("0.0.0.0", port)) == 0);
	CHECK(rdma_destroy_id(six) == 0);
	CHECK(rdma_destroy_id(four) == 0);
}

static void options(void)
{
	struct rdma_cm_id *a = new_id(), *b = new_id();
	int yes = 1;
	uint8_t small = 18;

	CHECK_FAILS(rdma_set_option(a, RDMA_OPTION_ID, RDMA_OPTION_ID_REUSEADDR, &yes, 1), EINVAL);
	CHECK_FAILS(rdma_set_option(a, RDMA_OPTION_ID, 99, &yes, sizeof(yes)), ENOSYS);
	CHECK_FAILS(rdma_set_option(a, 9, 0, &yes, sizeof(yes)), ENOSYS);
	CHECK(rdma_set_option(a, RDMA_OPTION_ID, RDMA_OPTION_ID_TOS, &small, 1) == 0);
	CHECK(rdma_set_option(a, RDMA_OPTION_ID, RDMA_OPTION_ID_ACK_TIMEOUT, &small, 1) == 0);
	CHECK(rdma_set_option(a, RDMA_OPTION_ID, RDMA_OPTION_ID_REUSEADDR, &yes, sizeof(yes)) == 0);
	CHECK(rdma_set_option(b, RDMA_OPTION_ID, RDMA_OPTION_ID_REUSEADDR, &yes, sizeof(yes)) == 0);
	CHECK(rdma_bind_addr(a, address("0.0.0.0", 0)) == 0);
	CHECK(rdma_bind_addr(b, address("0.0.0.0", ntohs(rdma_get_src_port(a)))) == 0);
	CHECK_FAILS(rdma_listen(a, 1), EADDRINUSE);
	CHECK(rdma_destroy_id(b) == 0);
	CHECK(rdma_listen(a, 1) == 0);
	CHECK(rdma_destroy_id(a) == 0);
}

static void resolving(void)
{
	struct rdma_cm_id *id = new_id();
	struct rdma_cm_event *event;
	union ibv_gid gid;

	CHECK_FAILS(rdma_resolve_addr(id, NULL, NULL, 10), EINVAL);
	CHECK_FAILS(rdma_resolve_route(id, 10), EINVAL);
	CHECK_FAILS(rdma_connect(id, NULL), EINVAL);
	CHECK_FAILS(rdma_disconnect(id), EINVAL);
	CHECK_FAILS(rdma_join_multicast(id, address("224.1.1.1", 0), NULL), EINVAL);
	CHECK_FAILS(rdma_leave_multicast(id, address("224.1.1.1", 0)), EADDRNOTAVAIL);
	CHECK(rdma_resolve_addr(id, NULL, address("198.51.100.77", 7), 10) == 0);
	event = expect(channel, RDMA_CM_EVENT_ADDR_ERROR);
	CHECK(event->id == id && event->status == -EHOSTUNREACH);
	CHECK(rdma_ack_cm_event(event) == 0);
	CHECK(rdma_resolve_addr(id, NULL, address("127.0.0.1", 7), 10) == 0);
	CHECK(is_readable(channel->fd));
	event = expect(channel, RDMA_CM_EVENT_ADDR_RESOLVED);
	CHECK(event->id == id && event->status == 0 && id->verbs && id->pd);
	CHECK(!is_readable(channel->fd));
	CHECK(rdma_ack_cm_event(event) == 0);
	CHECK(ntohs(rdma_get_dst_port(id)) == 7 && rdma_get_src_port(id) != 0);
	CHECK(rdma_resolve_route(id, 10) == 0);
	CHECK(rdma_ack_cm_event(expect(channel, RDMA_CM_EVENT_ROUTE_RESOLVED)) == 0);
	CHECK(id->route.num_paths == 1 && id->route.path_rec->mtu >= IBV_MTU_1024);
	CHECK(ibv_query_gid(id->verbs, 1, 0, &gid) == 0);
	CHECK(!memcmp(&gid, &id->route.addr.addr.ibaddr.sgid, 16));
	CHECK(!memcmp(&gid, &id->route.addr.addr.ibaddr.dgid, 16));
	/* Nobody listens there. */
	struct rdma_conn_param param = { .qp_num = 1 };
	CHECK(rdma_connect(id, &param) == 0);
	event = expect(channel, RDMA_CM_EVENT_REJECTED);
	CHECK(event->id == id && event->status == 8);
	CHECK(rdma_ack_cm_event(event) == 0);
	CHECK(rdma_destroy_id(id) == 0);
}

static void *acknowledge(void *event)
{
	CHECK(usleep(50 * 1000) == 0);
	CHECK(rdma_ack_cm_event(event) == 0);
	return NULL;
}

static void destroying_waits_for_acknowledgement(void)
{
	struct rdma_cm_id *id = new_id();
	pthread_t thread;

	CHECK(rdma_resolve_addr(id, NULL, address("127.0.0.1", 7), 10) == 0);
	struct rdma_cm_event *event = expect(channel, RDMA_CM_EVENT_ADDR_RESOLVED);
	/* One more, that is never fetched: it goes with the id, and the channel is not readable any more. */
	CHECK(rdma_resolve_route(id, 10) == 0);
	CHECK(is_readable(channel->fd));
	CHECK(pthread_create(&thread, NULL, acknowledge, event) == 0);
	CHECK(rdma_destroy_id(id) == 0);
	CHECK(!is_readable(channel->fd));
	CHECK(pthread_join(thread, NULL) == 0);
}

/* An address of this system's own, that is not loopback, is the device's. */
static void a_real_address(void)
{
	struct ifaddrs *list, *one;

	CHECK(getifaddrs(&list) == 0);
	for (one = list; one; one = one->ifa_next)
		if (one->ifa_addr && one->ifa_addr->sa_family == AF_INET && !(one->ifa_flags & IFF_LOOPBACK))
			break;
	if (one) {
		struct rdma_cm_id *id = new_id();
		CHECK(rdma_bind_addr(id, one->ifa_addr) == 0);
		CHECK(id->verbs && id->pd && id->port_num == 1);
		CHECK(!strcmp(ibv_get_device_name(id->verbs->device), "ff0"));
		CHECK(rdma_listen(id, 1) == 0 && rdma_get_src_port(id) != 0);
		CHECK(rdma_destroy_id(id) == 0);
	}
	freeifaddrs(list);
}

int main(void)
{
	int n = 0;

	channel = rdma_create_event_channel();
	CHECK(channel);
	struct ibv_context **list = rdma_get_devices(&n);
	CHECK(list && n == 1 && list[0] && !list[1]);
	rdma_free_devices(list);
	the_channel_obeys_its_flags();
	ports_and_addresses();
	a_real_address();
	a_wildcard_of_both_families();
	options();
	resolving();
	destroying_waits_for_acknowledgement();
	rdma_destroy_event_channel(channel);
	return 0;
}
