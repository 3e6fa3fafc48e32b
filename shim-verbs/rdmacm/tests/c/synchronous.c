/* Endpoints without a channel of the program's: every call waits for its own event. */
#include "cm.h"

static char port[8];
static pthread_barrier_t ready;

static struct rdma_cm_id *endpoint(int flags)
{
	struct rdma_addrinfo hints = { .ai_flags = flags, .ai_port_space = RDMA_PS_TCP }, *res;
	struct ibv_qp_init_attr attr = {
		.sq_sig_all = 1,
		.cap = { .max_send_wr = 2, .max_recv_wr = 2, .max_send_sge = 1, .max_recv_sge = 1 },
	};
	struct rdma_cm_id *id;

	CHECK(rdma_getaddrinfo(flags ? NULL : "127.0.0.1", flags ? NULL : port, &hints, &res) == 0 || flags);
	if (flags) { /* No service: a wildcard of our own, port 0. */
		memset(&hints, 0, sizeof(hints));
		hints = (struct rdma_addrinfo){ .ai_flags = flags, .ai_port_space = RDMA_PS_TCP,
						.ai_qp_type = IBV_QPT_RC, .ai_family = AF_INET,
						.ai_src_addr = address("0.0.0.0", 0),
						.ai_src_len = sizeof(struct sockaddr_in) };
		CHECK(rdma_getaddrinfo(NULL, NULL, &hints, &res) == 0);
	}
	CHECK(rdma_create_ep(&id, res, NULL, &attr) == 0);
	rdma_freeaddrinfo(res);
	return id;
}

static void *serve(void *arg)
{
	static char text[32];
	struct rdma_cm_id *listen = endpoint(RAI_PASSIVE), *id;
	struct ibv_wc wc;

	(void)arg;
	CHECK(rdma_listen(listen, 1) == 0);
	snprintf(port, sizeof(port), "%d", ntohs(rdma_get_src_port(listen)));
	pthread_barrier_wait(&ready);
	CHECK(rdma_get_request(listen, &id) == 0);
	CHECK(id->qp && id->event && id->event->event == RDMA_CM_EVENT_CONNECT_REQUEST && id->channel != listen->channel);
	struct ibv_mr *mr = rdma_reg_msgs(id, text, sizeof(text));
	CHECK(mr && rdma_post_recv(id, NULL, text, sizeof(text), mr) == 0);
	CHECK(rdma_accept(id, NULL) == 0);
	CHECK(id->event->event == RDMA_CM_EVENT_ESTABLISHED);
	CHECK(rdma_get_recv_comp(id, &wc) == 1 && wc.status == IBV_WC_SUCCESS);
	CHECK(!strcmp(text, "hello"));
	CHECK(rdma_disconnect(id) == 0);
	rdma_dereg_mr(mr);
	rdma_destroy_ep(id);
	/* The second client is turned away. */
	CHECK(rdma_get_request(listen, &id) == 0);
	CHECK(rdma_reject(id, NULL, 0) == 0);
	rdma_destroy_ep(id);
	rdma_destroy_ep(listen);
	return NULL;
}

int main(void)
{
	static char text[32] = "hello";
	struct ibv_wc wc;
	pthread_t thread;

	CHECK(pthread_barrier_init(&ready, NULL, 2) == 0);
	CHECK(pthread_create(&thread, NULL, serve, NULL) == 0);
	pthread_barrier_wait(&ready);
	struct rdma_cm_id *id = endpoint(0);
	CHECK(id->qp && id->verbs);
	struct ibv_mr *mr = rdma_reg_msgs(id, text, sizeof(text));
	CHECK(mr && rdma_connect(id, NULL) == 0);
	CHECK(id->event->event == RDMA_CM_EVENT_ESTABLISHED);
	CHECK(rdma_post_send(id, NULL, text, sizeof(text), mr, 0) == 0);
	CHECK(rdma_get_send_comp(id, &wc) == 1 && wc.status == IBV_WC_SUCCESS);
	CHECK(rdma_disconnect(id) == 0);
	CHECK(id->event->event == RDMA_CM_EVENT_DISCONNECTED);
	rdma_dereg_mr(mr);
	rdma_destroy_ep(id);

	id = endpoint(0);
	CHECK_FAILS(rdma_connect(id, NULL), ECONNREFUSED);
	rdma_destroy_ep(id);
	CHECK(pthread_join(thread, NULL) == 0);
	return 0;
}
