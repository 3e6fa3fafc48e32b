/* qps CPU CPU COUNT: GB/s of 4 KiB WRITEs over COUNT RC QPs, one after the other, into 256 buffers: the same total
 * footprint and the same order for every COUNT.
 * qps CPU CPU COUNT idle: connects them, says so, and sleeps. */
#include "probe.h"
#include <errno.h>
#include <infiniband/verbs.h>
#include <sys/socket.h>

enum { SIZE = 4096, BUFFERS = 256, WINDOW = 256, DEPTH = 256, MESSAGES = 400000, MAX = 256 };

struct end {
	union ibv_gid gid;
	uint64_t addr;
	uint32_t rkey, qpn[MAX];
};

static struct ibv_cq *cq;
static struct ibv_qp *qps[MAX];
static struct ibv_mr *mr;
static int count;

static void make(struct end *mine)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	MUST(list && list[0]);
	struct ibv_context *context = ibv_open_device(list[0]);
	MUST(context);
	struct ibv_pd *pd = ibv_alloc_pd(context);
	MUST(pd);
	char *memory = aligned_alloc(SIZE, BUFFERS * SIZE);
	MUST(memory);
	memset(memory, 1, BUFFERS * SIZE);
	mr = ibv_reg_mr(pd, memory, BUFFERS * SIZE, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
	MUST(mr);
	struct ibv_comp_channel *channel = ibv_create_comp_channel(context);
	MUST(channel);
	cq = ibv_create_cq(context, WINDOW, NULL, channel, 0);
	MUST(cq);
	struct ibv_qp_init_attr init = { .send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC, .sq_sig_all = 1,
		.cap = { .max_send_wr = DEPTH, .max_recv_wr = 1, .max_send_sge = 1, .max_recv_sge = 1 } };
	for (int i = 0; i < count; i++) {
		qps[i] = ibv_create_qp(pd, &init);
		MUST(qps[i]);
		mine->qpn[i] = qps[i]->qp_num;
	}
	MUST(ibv_query_gid(context, 1, 0, &mine->gid) == 0);
	mine->addr = (uintptr_t)memory;
	mine->rkey = mr->rkey;
}

static void connect_all(const struct end *peer)
{
	for (int i = 0; i < count; i++) {
		struct ibv_qp_attr a = { .qp_state = IBV_QPS_INIT, .port_num = 1, .qp_access_flags = IBV_ACCESS_REMOTE_WRITE };
		MUST(ibv_modify_qp(qps[i], &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS) == 0);
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

static int reap(void)
{
	struct ibv_wc wc[16];
	int got = ibv_poll_cq(cq, 16, wc);
	MUST(got >= 0);
	for (int i = 0; i < got; i++)
		MUST(wc[i].status == IBV_WC_SUCCESS);
	return got;
}

static void write_all(const struct end *peer, long messages)
{
	long posted = 0, done = 0;
	while (done < messages) {
		if (posted < messages && posted - done < WINDOW) {
			uint64_t at = posted % BUFFERS * SIZE;
			struct ibv_sge sge = { (uintptr_t)mr->addr + at, SIZE, mr->lkey };
			struct ibv_send_wr *bad, wr = { .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE,
				.wr.rdma = { peer->addr + at, peer->rkey } };
			MUST(ibv_post_send(qps[posted % count], &wr, &bad) == 0);
			posted++;
		} else {
			done += reap();
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
	MUST(argc >= 4);
	count = atoi(argv[3]);
	MUST(count > 0 && count <= MAX);
	int pair[2];
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
	int target = fork_pinned(atoi(argv[1]), atoi(argv[2])) == 0;
	int fd = pair[target];
	struct end mine = { 0 }, peer;
	make(&mine);
	swap(fd, &mine, &peer);
	connect_all(&peer);
	swap(fd, &mine, &peer);
	if (argc > 4) {
		if (!target) {
			puts("connected");
			fflush(stdout);
		}
		pause();
	}
	if (!target) {
		write_all(&peer, MESSAGES / 10);
		double start = now();
		write_all(&peer, MESSAGES);
		printf("%f\n", (double)MESSAGES * SIZE / (now() - start) / 1e9);
	}
	swap(fd, &mine, &peer);
	return 0;
}
