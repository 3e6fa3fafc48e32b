/* ops write|wr|send COUNT: that many 8-byte operations between two QPs of one process, batches of 16 posted, then polled.
 * Under callgrind the difference between two counts is what one operation costs in instructions. */
#include "probe.h"
#include <infiniband/verbs.h>

enum { SIZE = 8, BATCH = 16 };
static const int ACCESS = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;

struct end {
	struct ibv_cq *cq;
	struct ibv_qp *qp;
	struct ibv_mr *mr;
	char *memory;
};

static struct end make(struct ibv_pd *pd)
{
	struct end end = { .cq = ibv_create_cq(pd->context, 2 * BATCH, NULL, NULL, 0) };
	MUST(end.cq);
	struct ibv_qp_init_attr_ex init = { .send_cq = end.cq, .recv_cq = end.cq, .qp_type = IBV_QPT_RC, .pd = pd,
		.comp_mask = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS, .send_ops_flags = IBV_QP_EX_WITH_RDMA_WRITE,
		.sq_sig_all = 1, .cap = { .max_send_wr = BATCH, .max_recv_wr = BATCH, .max_send_sge = 1, .max_recv_sge = 1 } };
	end.qp = ibv_create_qp_ex(pd->context, &init);
	MUST(end.qp);
	end.memory = aligned_alloc(4096, 4096);
	MUST(end.memory);
	memset(end.memory, 0, 4096);
	end.mr = ibv_reg_mr(pd, end.memory, 4096, ACCESS);
	MUST(end.mr);
	return end;
}

static void connect_to(struct end *end, struct end *peer, const union ibv_gid *gid)
{
	struct ibv_qp_attr a = { .qp_state = IBV_QPS_INIT, .port_num = 1, .qp_access_flags = IBV_ACCESS_REMOTE_WRITE };
	MUST(ibv_modify_qp(end->qp, &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS) == 0);
	struct ibv_qp_attr r = { .qp_state = IBV_QPS_RTR, .path_mtu = IBV_MTU_4096, .dest_qp_num = peer->qp->qp_num,
		.max_dest_rd_atomic = 1, .min_rnr_timer = 12,
		.ah_attr = { .is_global = 1, .port_num = 1, .grh = { .dgid = *gid, .hop_limit = 1 } } };
	MUST(ibv_modify_qp(end->qp, &r, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
		IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER) == 0);
	struct ibv_qp_attr s = { .qp_state = IBV_QPS_RTS, .timeout = 14, .retry_cnt = 7, .rnr_retry = 7, .max_rd_atomic = 1 };
	MUST(ibv_modify_qp(end->qp, &s, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
		IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC) == 0);
}

static void reap(struct end *end, int count)
{
	struct ibv_wc wc[BATCH];
	while (count > 0) {
		int got = ibv_poll_cq(end->cq, BATCH, wc);
		MUST(got >= 0);
		for (int i = 0; i < got; i++)
			MUST(wc[i].status == IBV_WC_SUCCESS);
		count -= got;
	}
}

static void post_write(struct end *from, struct end *to, enum ibv_wr_opcode opcode)
{
	struct ibv_sge sge = { (uintptr_t)from->memory, SIZE, from->mr->lkey };
	struct ibv_send_wr *bad, wr = { .sg_list = &sge, .num_sge = 1, .opcode = opcode,
		.wr.rdma = { (uintptr_t)to->memory, to->mr->rkey } };
	MUST(ibv_post_send(from->qp, &wr, &bad) == 0);
}

static void post_by_wr(struct end *from, struct end *to)
{
	struct ibv_qp_ex *qp = ibv_qp_to_qp_ex(from->qp);
	ibv_wr_start(qp);
	qp->wr_id = 0;
	qp->wr_flags = IBV_SEND_SIGNALED;
	ibv_wr_rdma_write(qp, to->mr->rkey, (uintptr_t)to->memory);
	ibv_wr_set_sge(qp, from->mr->lkey, (uintptr_t)from->memory, SIZE);
	MUST(ibv_wr_complete(qp) == 0);
}

static void post_receive(struct end *at)
{
	struct ibv_sge sge = { (uintptr_t)at->memory, SIZE, at->mr->lkey };
	struct ibv_recv_wr *bad, wr = { .sg_list = &sge, .num_sge = 1 };
	MUST(ibv_post_recv(at->qp, &wr, &bad) == 0);
}

int main(int argc, char **argv)
{
	MUST(argc == 3);
	struct ibv_device **list = ibv_get_device_list(NULL);
	MUST(list && list[0]);
	struct ibv_context *context = ibv_open_device(list[0]);
	MUST(context);
	struct ibv_pd *pd = ibv_alloc_pd(context);
	MUST(pd);
	union ibv_gid gid;
	MUST(ibv_query_gid(context, 1, 0, &gid) == 0);
	struct end a = make(pd), b = make(pd);
	connect_to(&a, &b, &gid);
	connect_to(&b, &a, &gid);
	int send = !strcmp(argv[1], "send"), by_wr = !strcmp(argv[1], "wr"), batches = atoi(argv[2]) / BATCH;
	double start = now();
	for (int batch = 0; batch < batches; batch++) {
		for (int i = 0; i < BATCH; i++) {
			if (send)
				post_receive(&b);
			if (by_wr)
				post_by_wr(&a, &b);
			else
				post_write(&a, &b, send ? IBV_WR_SEND : IBV_WR_RDMA_WRITE);
		}
		reap(&a, BATCH);
		if (send)
			reap(&b, BATCH);
	}
	printf("%f\n", (now() - start) / atoi(argv[2]) * 1e9);
	return 0;
}
