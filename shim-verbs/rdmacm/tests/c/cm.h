/* Shared by the test programs: checks, addresses, and the steps that most of them begin with. */
#ifndef CM_H
#define CM_H
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <rdma/rdma_cma.h>
#include <rdma/rdma_verbs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CHECK(what)                                                                                    \
	do {                                                                                           \
		if (!(what)) {                                                                         \
			fprintf(stderr, "%s:%d: %s (errno %d: %s)\n", __FILE__, __LINE__, #what, errno, \
				strerror(errno));                                                      \
			exit(1);                                                                       \
		}                                                                                      \
	} while (0)

/* `call` fails as the library's functions do: -1 and this errno. */
#define CHECK_FAILS(call, error)           \
	do {                               \
		errno = 0;                 \
		CHECK((call) == -1);       \
		CHECK(errno == (error));   \
	} while (0)

static inline struct sockaddr *address(const char *ip, int port)
{
	static __thread struct sockaddr_in in[4];
	static __thread int turn;
	struct sockaddr_in *one = &in[turn++ % 4];
	*one = (struct sockaddr_in){ .sin_family = AF_INET, .sin_port = htons(port) };
	CHECK(inet_pton(AF_INET, ip, &one->sin_addr) == 1);
	return (struct sockaddr *)one;
}

/* Waits for an event and checks which it is; the caller acknowledges it. */
static inline struct rdma_cm_event *expect(struct rdma_event_channel *channel, enum rdma_cm_event_type type)
{
	struct rdma_cm_event *event;
	CHECK(rdma_get_cm_event(channel, &event) == 0);
	if (event->event != type) {
		fprintf(stderr, "%s (status %d) instead of %s\n", rdma_event_str(event->event), event->status,
			rdma_event_str(type));
		exit(1);
	}
	return event;
}

static inline int is_readable(int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };
	return poll(&p, 1, 0) == 1 && (p.revents & POLLIN);
}

/* A listener on a port of the router's choice. */
static inline struct rdma_cm_id *listener(struct rdma_event_channel *channel, enum rdma_port_space ps, int *port)
{
	struct rdma_cm_id *id;
	CHECK(rdma_create_id(channel, &id, (void *)0x1234, ps) == 0);
	CHECK(rdma_bind_addr(id, address("0.0.0.0", 0)) == 0);
	CHECK(rdma_listen(id, 8) == 0);
	*port = ntohs(rdma_get_src_port(id));
	CHECK(*port >= 1024);
	return id;
}

/* An id with its route to a local port. */
static inline struct rdma_cm_id *routed(struct rdma_event_channel *channel, enum rdma_port_space ps, int port)
{
	struct rdma_cm_id *id;
	CHECK(rdma_create_id(channel, &id, NULL, ps) == 0);
	CHECK(rdma_resolve_addr(id, NULL, address("127.0.0.1", port), 1000) == 0);
	CHECK(rdma_ack_cm_event(expect(channel, RDMA_CM_EVENT_ADDR_RESOLVED)) == 0);
	CHECK(rdma_resolve_route(id, 1000) == 0);
	CHECK(rdma_ack_cm_event(expect(channel, RDMA_CM_EVENT_ROUTE_RESOLVED)) == 0);
	return id;
}

/* A QP with CQs of its own making. */
static inline void create_qp(struct rdma_cm_id *id)
{
	struct ibv_qp_init_attr attr = {
		.qp_type = id->qp_type,
		.sq_sig_all = 1,
		.cap = { .max_send_wr = 4, .max_recv_wr = 4, .max_send_sge = 1, .max_recv_sge = 1 },
	};
	CHECK(rdma_create_qp(id, NULL, &attr) == 0);
	CHECK(id->qp && id->pd && id->qp->pd == id->pd && id->send_cq && id->recv_cq && id->send_cq_channel);
	CHECK(attr.send_cq == id->send_cq && attr.recv_cq == id->recv_cq);
}

static inline enum ibv_qp_state qp_state(struct rdma_cm_id *id, struct ibv_qp_attr *attr)
{
	struct ibv_qp_init_attr init;
	CHECK(ibv_query_qp(id->qp, attr, ~0, &init) == 0);
	return attr->qp_state;
}
#endif
