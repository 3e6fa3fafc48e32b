/* XRC endpoints: a target and its shared queue, made with the id's own domain and CQ, and an initiator that names the queue. */
#include "cm.h"

static char port[8];
static pthread_barrier_t ready;

static struct rdma_cm_id *endpoint(int flags, enum ibv_qp_type type)
{
	struct rdma_addrinfo hints = { .ai_flags = flags, .ai_port_space = RDMA_PS_IB, .ai_qp_type = type }, *res;
	struct ibv_qp_init_attr attr = {
		.sq_sig_all = 1,
		.cap = { .max_send_wr = 2, .max_recv_wr = 2, .max_send_sge = 1, .max_recv_sge = 1 },
	};
	struct rdma_cm_id *id;

	CHECK(rdma_getaddrinfo(flags ? NULL : "127.0.0.1", port, &hints, &res) == 0);
	CHECK(rdma_create_ep(&id, res, NULL, &attr) == 0);
	rdma_freeaddrinfo(res);
	CHECK(id->ps == RDMA_PS_IB && id->qp_type == type);
	return id;
}

static void *serve(void *arg)
{
	static char text[32];
	struct ibv_srq_init_attr attr = { .attr = { .max_wr = 2, .max_sge = 1 } };
	struct rdma_cm_id *listen = endpoint(RAI_PASSIVE, IBV_QPT_XRC_RECV), *id;
	struct ibv_wc wc;
	uint32_t number;

	(void)arg;
	CHECK(rdma_listen(listen, 1) == 0);
	pthread_barrier_wait(&ready);
	CHECK(rdma_get_request(listen, &id) == 0);
	CHECK(id->qp && id->qp->qp_type == IBV_QPT_XRC_RECV && id->pd && !id->send_cq && !id->recv_cq);
	CHECK(rdma_create_srq(id, NULL, &attr) == 0);
	CHECK(id->srq && id->recv_cq && ibv_get_srq_num(id->srq, &number) == 0);
	struct ibv_mr *mr = rdma_reg_msgs(id, text, sizeof(text));
	CHECK(mr && rdma_post_recv(id, NULL, text, sizeof(text), mr) == 0);
	struct rdma_conn_param param = { .private_data = &number, .private_data_len = sizeof(number) };
	CHECK(rdma_accept(id, &param) == 0);
	CHECK(rdma_get_recv_comp(id, &wc) == 1 && wc.status == IBV_WC_SUCCESS);
	CHECK(!strcmp(text, "hello"));
	CHECK(rdma_disconnect(id) == 0);
	rdma_dereg_mr(mr);
	rdma_destroy_ep(id);
	rdma_destroy_ep(listen);
	return NULL;
}

int main(void)
{
	static char text[32] = "hello";
	pthread_t thread;
	struct ibv_wc wc;
	struct rdma_cm_id *other;

	snprintf(port, sizeof(port), "%d", 7471);
	CHECK_FAILS(rdma_create_id(NULL, &other, NULL, 0x7777), EPROTONOSUPPORT);
	CHECK(pthread_barrier_init(&ready, NULL, 2) == 0);
	CHECK(pthread_create(&thread, NULL, serve, NULL) == 0);
	pthread_barrier_wait(&ready);
	struct rdma_cm_id *id = endpoint(0, IBV_QPT_XRC_SEND);
	CHECK(id->qp && id->qp->qp_type == IBV_QPT_XRC_SEND && id->send_cq);
	CHECK(rdma_connect(id, NULL) == 0);
	CHECK(id->event->param.conn.private_data_len >= 4);
	struct ibv_mr *mr = rdma_reg_msgs(id, text, sizeof(text));
	struct ibv_sge sge = { .addr = (uintptr_t)text, .length = sizeof(text), .lkey = mr->lkey };
	struct ibv_send_wr wr = { .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_SEND }, *bad;
	memcpy(&wr.qp_type.xrc.remote_srqn, id->event->param.conn.private_data, 4);
	CHECK(ibv_post_send(id->qp, &wr, &bad) == 0);
	CHECK(rdma_get_send_comp(id, &wc) == 1 && wc.status == IBV_WC_SUCCESS);
	CHECK(rdma_disconnect(id) == 0);
	rdma_dereg_mr(mr);
	rdma_destroy_ep(id);
	CHECK(pthread_join(thread, NULL) == 0);
	return 0;
}
