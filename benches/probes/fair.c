/* fair PORT COUNT SIZE: the target. fair PORT COUNT SIZE SECONDS ADDRESS: writes SIZE bytes over COUNT RC QPs, each with DEPTH
 * requests out at all times, and prints GB/s, Jain's fairness of what each QP moved, and the least and the most of them. */
#include "probe.h"
#include <arpa/inet.h>
#include <infiniband/verbs.h>
#include <sys/socket.h>

enum { MAX = 1024, DEPTH = 4, BUFFERS = 16 };

struct end {
	union ibv_gid gid;
	uint64_t addr;
	uint32_t rkey, qpn[MAX];
};

static struct ibv_cq *cq;
static struct ibv_qp *qps[MAX];
static struct ibv_mr *mr;
static int count;
static size_t size;
static long moved[MAX];

static void make(struct end *mine)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	MUST(list && list[0]);
	struct ibv_context *context = ibv_open_device(list[0]);
	MUST(context);
	struct ibv_pd *pd = ibv_alloc_pd(context);
	MUST(pd);
	char *memory = aligned_alloc(4096, BUFFERS * size);
	MUST(memory);
	memset(memory, 1, BUFFERS * size);
	mr = ibv_reg_mr(pd, memory, BUFFERS * size, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
	MUST(mr);
	cq = ibv_create_cq(context, count * DEPTH, NULL, NULL, 0);
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

static void post(int qp, const struct end *peer)
{
	static unsigned turn;
	uint64_t at = turn++ % BUFFERS * size;
	struct ibv_sge sge = { (uintptr_t)mr->addr + at, size, mr->lkey };
	struct ibv_send_wr *bad, wr = { .wr_id = qp, .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE,
		.wr.rdma = { peer->addr + at, peer->rkey } };
	MUST(ibv_post_send(qps[qp], &wr, &bad) == 0);
}

/* Posts anew what completes, for that long; then waits for the rest. */
static double write_for(double seconds, const struct end *peer)
{
	double begin = now(), end = begin + seconds, at = begin;
	int out = 0;
	for (int i = 0; i < count * DEPTH; i++, out++)
		post(i % count, peer);
	memset(moved, 0, sizeof moved);
	while (out > 0) {
		struct ibv_wc wc[32];
		int got = ibv_poll_cq(cq, 32, wc);
		at = now();
		for (int i = 0; i < got; i++) {
			MUST(wc[i].status == IBV_WC_SUCCESS);
			if (at < end) {
				moved[wc[i].wr_id]++;
				post(wc[i].wr_id, peer);
			} else {
				out--;
			}
		}
	}
	return seconds;
}

static void report(double seconds)
{
	double sum = 0, squares = 0;
	long least = moved[0], most = moved[0];
	for (int i = 0; i < count; i++) {
		sum += moved[i];
		squares += (double)moved[i] * moved[i];
		least = moved[i] < least ? moved[i] : least;
		most = moved[i] > most ? moved[i] : most;
	}
	printf("%f %f %ld %ld\n", sum * size / seconds / 1e9, squares ? sum * sum / count / squares : 0, least, most);
}

static int meet(int port, const char *server)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons(port) };
	int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
	MUST(fd >= 0);
	if (server) {
		MUST(inet_pton(AF_INET, server, &a.sin_addr) == 1);
		MUST(connect(fd, (struct sockaddr *)&a, sizeof a) == 0);
		return fd;
	}
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	MUST(bind(fd, (struct sockaddr *)&a, sizeof a) == 0 && listen(fd, 1) == 0);
	return accept(fd, NULL, NULL);
}

static void swap(int fd, const struct end *mine, struct end *theirs)
{
	MUST(send(fd, mine, sizeof *mine, 0) == sizeof *mine);
	MUST(recv(fd, theirs, sizeof *theirs, MSG_WAITALL) == sizeof *theirs);
}

int main(int argc, char **argv)
{
	static struct end mine, peer;
	MUST(argc == 4 || argc == 6);
	count = atoi(argv[2]);
	size = atol(argv[3]);
	MUST(count > 0 && count <= MAX && size > 0);
	int fd = meet(atoi(argv[1]), argc == 6 ? argv[5] : NULL);
	MUST(fd >= 0);
	make(&mine);
	swap(fd, &mine, &peer);
	connect_all(&peer);
	swap(fd, &mine, &peer);
	if (argc == 6) {
		write_for(0.5, &peer);
		report(write_for(atof(argv[4]), &peer));
	}
	swap(fd, &mine, &peer);
	return 0;
}
