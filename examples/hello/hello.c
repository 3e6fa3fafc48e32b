/* The smallest complete verbs program: the client writes a line into the server's memory by RDMA.
 *
 *   hello              the server: prints what arrives in its memory
 *   hello ADDRESS      the client
 *
 * Addresses and keys are exchanged over TCP; the line itself is not. Nothing here knows which NIC it runs on.
 */
#include <arpa/inet.h>
#include <infiniband/verbs.h>
#include <netdb.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PORT "7471"

static void check(int ok, const char *what)
{
	if (!ok) {
		perror(what);
		exit(1);
	}
}

/* What each side must know of the other. */
struct card {
	union ibv_gid gid;
	uint64_t addr;
	uint32_t rkey, qpn;
};

static int tcp(const char *host)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM, .ai_flags = host ? 0 : AI_PASSIVE, .ai_family = AF_INET }, *ai;
	int one = 1;

	check(!getaddrinfo(host, PORT, &hints, &ai), "getaddrinfo");
	int fd = socket(ai->ai_family, ai->ai_socktype, 0);
	check(fd >= 0, "socket");
	if (host) {
		check(!connect(fd, ai->ai_addr, ai->ai_addrlen), "connect");
	} else {
		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
		check(!bind(fd, ai->ai_addr, ai->ai_addrlen) && !listen(fd, 1), "listen");
		int peer = accept(fd, NULL, NULL);
		close(fd);
		fd = peer;
	}
	freeaddrinfo(ai);
	check(fd >= 0, "accept");
	return fd;
}

static struct card swap(int fd, struct card mine)
{
	struct card theirs;

	check(write(fd, &mine, sizeof mine) == sizeof mine, "send card");
	check(recv(fd, &theirs, sizeof theirs, MSG_WAITALL) == sizeof theirs, "receive card");
	return theirs;
}

static void connect_qp(struct ibv_qp *qp, const struct card *peer)
{
	struct ibv_qp_attr a = { .qp_state = IBV_QPS_INIT, .port_num = 1, .qp_access_flags = IBV_ACCESS_REMOTE_WRITE };

	check(!ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS), "INIT");
	a = (struct ibv_qp_attr){ .qp_state = IBV_QPS_RTR, .path_mtu = IBV_MTU_4096, .dest_qp_num = peer->qpn, .max_dest_rd_atomic = 1,
		.min_rnr_timer = 12, .ah_attr = { .is_global = 1, .port_num = 1, .grh = { .dgid = peer->gid, .hop_limit = 64 } } };
	check(!ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
		IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER), "RTR");
	a = (struct ibv_qp_attr){ .qp_state = IBV_QPS_RTS, .timeout = 14, .retry_cnt = 7, .rnr_retry = 7, .max_rd_atomic = 1 };
	check(!ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
		IBV_QP_MAX_QP_RD_ATOMIC), "RTS");
}

int main(int argc, char **argv)
{
	static char line[4096];
	struct ibv_device **devices = ibv_get_device_list(NULL);

	check(devices && devices[0], "no RDMA device");
	struct ibv_context *ctx = ibv_open_device(devices[0]);
	check(ctx != NULL, "open");
	struct ibv_pd *pd = ibv_alloc_pd(ctx);
	struct ibv_cq *cq = ibv_create_cq(ctx, 1, NULL, NULL, 0);
	struct ibv_mr *mr = ibv_reg_mr(pd, line, sizeof line, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
	check(pd && cq && mr, "objects");
	struct ibv_qp_init_attr init = { .send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC,
		.cap = { .max_send_wr = 1, .max_recv_wr = 1, .max_send_sge = 1, .max_recv_sge = 1 } };
	struct ibv_qp *qp = ibv_create_qp(pd, &init);
	check(qp != NULL, "QP");

	struct card me = { .addr = (uintptr_t)line, .rkey = mr->rkey, .qpn = qp->qp_num };
	check(!ibv_query_gid(ctx, 1, 0, &me.gid), "GID");
	int fd = tcp(argc > 1 ? argv[1] : NULL);
	struct card peer = swap(fd, me);
	connect_qp(qp, &peer);
	swap(fd, me); /* both QPs are connected */

	if (argc > 1) {
		struct ibv_sge sge = { .addr = (uintptr_t)line, .length = sizeof line, .lkey = mr->lkey };
		struct ibv_send_wr wr = { .opcode = IBV_WR_RDMA_WRITE, .send_flags = IBV_SEND_SIGNALED, .sg_list = &sge, .num_sge = 1,
			.wr.rdma = { .remote_addr = peer.addr, .rkey = peer.rkey } }, *bad;
		struct ibv_wc wc = { 0 };

		snprintf(line, sizeof line, "hello from process %d, by RDMA over %s", getpid(), ibv_get_device_name(devices[0]));
		check(!ibv_post_send(qp, &wr, &bad), "post");
		while (!ibv_poll_cq(cq, 1, &wc))
			;
		printf("written: %s\n", ibv_wc_status_str(wc.status));
		swap(fd, me); /* the server may look now */
		return wc.status != IBV_WC_SUCCESS;
	}
	swap(fd, me);
	printf("%s\n", line);
	return line[0] != 'h';
}
