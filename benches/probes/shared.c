/* shared CPU CPU private|cq|srq: us per 8-byte SEND, one after the other over 64 RC QPs. The receiver has for each QP a CQ and
 * receives of its own (private), one CQ for all (cq), or one shared receive queue for all (srq). It knows whose turn it is,
 * so private CQs cost it nothing to find. */
#include "probe.h"
#include <errno.h>
#include <infiniband/verbs.h>
#include <sys/socket.h>

enum { QPS = 64, SIZE = 8, EACH = 8, WINDOW = QPS * EACH, CREDIT = QPS * 2, MESSAGES = 500000 };

struct end {
	union ibv_gid gid;
	uint32_t qpn[QPS];
};

static int one_cq, one_rq, target;
static struct ibv_cq *send_cq, *cqs[QPS];
static struct ibv_qp *qps[QPS];
static struct ibv_srq *srq;
static struct ibv_mr *mr;

static void post_receive(int qp)
{
	struct ibv_sge sge = { (uintptr_t)mr->addr + (size_t)qp * 64, SIZE, mr->lkey };
	struct ibv_recv_wr *bad, wr = { .wr_id = (uint64_t)qp, .sg_list = &sge, .num_sge = 1 };
	MUST((srq ? ibv_post_srq_recv(srq, &wr, &bad) : ibv_post_recv(qps[qp], &wr, &bad)) == 0);
}

static void make(struct end *mine)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	MUST(list && list[0]);
	struct ibv_context *context = ibv_open_device(list[0]);
	MUST(context);
	struct ibv_pd *pd = ibv_alloc_pd(context);
	MUST(pd);
	char *memory = aligned_alloc(4096, QPS * 64);
	MUST(memory);
	memset(memory, 1, QPS * 64);
	mr = ibv_reg_mr(pd, memory, QPS * 64, IBV_ACCESS_LOCAL_WRITE);
	MUST(mr);
	send_cq = ibv_create_cq(context, WINDOW * 2, NULL, NULL, 0);
	MUST(send_cq);
	/* What is compared is the receiver's: the other end always has queues of its own. */
	struct ibv_srq_init_attr shared = { .attr = { .max_wr = WINDOW, .max_sge = 1 } };
	srq = target && one_rq ? ibv_create_srq(pd, &shared) : NULL;
	MUST(srq || !(target && one_rq));
	for (int i = 0; i < QPS; i++) {
		cqs[i] = target && one_cq && i ? cqs[0] : ibv_create_cq(context, target && one_cq ? WINDOW : EACH * 4, NULL, NULL, 0);
		MUST(cqs[i]);
		struct ibv_qp_init_attr init = { .send_cq = send_cq, .recv_cq = cqs[i], .srq = srq, .qp_type = IBV_QPT_RC,
			.cap = { .max_send_wr = EACH * 4, .max_recv_wr = EACH, .max_send_sge = 1, .max_recv_sge = 1, .max_inline_data = SIZE } };
		qps[i] = ibv_create_qp(pd, &init);
		MUST(qps[i]);
		mine->qpn[i] = qps[i]->qp_num;
	}
	MUST(ibv_query_gid(context, 1, 0, &mine->gid) == 0);
}

static void connect_all(const struct end *peer)
{
	for (int i = 0; i < QPS; i++) {
		struct ibv_qp_attr a = { .qp_state = IBV_QPS_INIT, .port_num = 1 };
		MUST(ibv_modify_qp(qps[i], &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS) == 0);
		for (int k = 0; k < EACH; k++)
			post_receive(i);
		struct ibv_qp_attr r = { .qp_state = IBV_QPS_RTR, .path_mtu = IBV_MTU_4096, .dest_qp_num = peer->qpn[i],
			.max_dest_rd_atomic = 1, .min_rnr_timer = 12,
			.ah_attr = { .is_global = 1, .port_num = 1, .grh = { .dgid = peer->gid, .hop_limit = 1 } } };
		MUST(ibv_modify_qp(qps[i], &r, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
			IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER) == 0);
		struct ibv_qp_attr s = { .qp_state = IBV_QPS_RTS, .timeout = 14, .retry_cnt = 7, .rnr_retry = 7, .max_rd_atomic = 1 };
		MUST(ibv_modify_qp(qps[i], &s, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
			IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC) == 0);
	}
}

static void post_send(int qp, int signaled)
{
	uint64_t data = 7;
	struct ibv_sge sge = { (uintptr_t)&data, SIZE, 0 };
	struct ibv_send_wr *bad, wr = { .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_SEND,
		.send_flags = IBV_SEND_INLINE | (signaled ? IBV_SEND_SIGNALED : 0) };
	MUST(ibv_post_send(qps[qp], &wr, &bad) == 0);
}

static int reap(struct ibv_cq *cq)
{
	struct ibv_wc wc[16];
	int got = ibv_poll_cq(cq, 16, wc);
	MUST(got >= 0);
	for (int i = 0; i < got; i++)
		MUST(wc[i].status == IBV_WC_SUCCESS);
	return got;
}

/* Every EACH-th request of a QP is signaled; a credit from the receiver stands for CREDIT messages. */
static void send_all(long messages)
{
	long sent = 0, taken = 0;
	while (taken < messages) {
		if (sent < messages && sent - taken < WINDOW) {
			post_send(sent % QPS, sent / QPS % EACH == 0);
			sent++;
			continue;
		}
		while (reap(send_cq) > 0)
			;
		for (int credits = reap(cqs[0]); credits > 0; credits--, taken += CREDIT)
			post_receive(0);
	}
}

static void receive_all(long messages)
{
	long got = 0, told = 0, next = 0, of[QPS] = { 0 };
	while (got < messages) {
		struct ibv_wc wc[16];
		while (!one_cq && of[next % QPS] > next / QPS)
			next++; /* taken with an earlier one of its QP */
		int n = ibv_poll_cq(cqs[next % QPS], 16, wc);
		MUST(n >= 0);
		of[next % QPS] += n;
		for (int i = 0; i < n; i++) {
			MUST(wc[i].status == IBV_WC_SUCCESS);
			post_receive((int)wc[i].wr_id);
		}
		got += n;
		for (; got - told >= CREDIT; told += CREDIT) {
			post_send(0, 1);
			while (reap(send_cq) > 0)
				;
		}
	}
}

/* The two ends tell each other `mine` and wait for the other's. */
static void swap(int fd, const struct end *mine, struct end *theirs)
{
	MUST(send(fd, mine, sizeof *mine, 0) == sizeof *mine);
	MUST(recv(fd, theirs, sizeof *theirs, MSG_WAITALL) == sizeof *theirs);
}

int main(int argc, char **argv)
{
	MUST(argc == 4);
	one_cq = !strcmp(argv[3], "cq");
	one_rq = !strcmp(argv[3], "srq");
	MUST(one_cq || one_rq || !strcmp(argv[3], "private"));
	int pair[2];
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
	target = fork_pinned(atoi(argv[1]), atoi(argv[2])) == 0;
	int fd = pair[target];
	struct end mine = { 0 }, peer;
	make(&mine);
	swap(fd, &mine, &peer);
	connect_all(&peer);
	swap(fd, &mine, &peer);
	long warm = MESSAGES / 10 / CREDIT * CREDIT, all = MESSAGES / CREDIT * CREDIT;
	if (target) {
		receive_all(warm);
		receive_all(all);
	} else {
		send_all(warm);
		double start = now();
		send_all(all);
		printf("%f\n", (now() - start) / all * 1e6);
	}
	swap(fd, &mine, &peer);
	return 0;
}
