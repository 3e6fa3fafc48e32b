/*
 * Revocation with the copier stopped at every step.
 *
 *     revoke SAMPLES SEED [PART PARTS]          SAMPLES 0: every step; of those, or of the samples, each PARTS-th from the PART-th on
 *
 * A child process posts a WRITE, or a SEND, to its parent's memory and is single-stepped by the parent for K instructions.
 * Then the parent deregisters the memory and registers it anew, with a new key; when the child goes on, it may not change
 * any more.  K goes through all instructions of ibv_post_send, or a sample of them.  The parent says "wrong step K" when a
 * late byte is found, and "revoked N steps of TOTAL, M landed before" in the end.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <infiniband/verbs.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BYTES = 512, PAGE = 4096 };

/* What both write, each while the other is stopped or waits for it. */
struct board {
	uint32_t qpn[2], rkey;
	uint64_t addr;
	bool send;
	int status;
};

static struct board *board;
static struct ibv_context *ctx;
static struct ibv_pd *pd;
static struct ibv_cq *cq;
static struct ibv_qp *qp;
static union ibv_gid gid;

#define WRONG(...) (printf("wrong " __VA_ARGS__), putchar('\n'), fflush(stdout), _exit(1))
#define OK(call)                                                                                                        \
	do {                                                                                                            \
		int rc_ = (call);                                                                                       \
		if (rc_)                                                                                                \
			WRONG(#call ": %d (%s)", rc_, strerror(rc_ < 0 ? errno : rc_));                                 \
	} while (0)
static void *made(void *object, const char *what)
{
	if (!object)
		WRONG("%s: %s", what, strerror(errno));
	return object;
}
#define MADE(call) made((call), #call)

static void open_device(void)
{
	struct ibv_device **list = MADE(ibv_get_device_list(NULL));

	ctx = MADE(ibv_open_device(list[0]));
	OK(ibv_query_gid(ctx, 1, 0, &gid));
	cq = MADE(ibv_create_cq(ctx, 8, NULL, NULL, 0));
}

static void *pages(size_t len, int byte)
{
	void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		WRONG("mmap: %s", strerror(errno));
	return memset(p, byte, len);
}

static uint32_t make_qp(void)
{
	struct ibv_qp_init_attr init = { .send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC, .sq_sig_all = 1,
					 .cap = { .max_send_wr = 2, .max_recv_wr = 2, .max_send_sge = 1, .max_recv_sge = 1 } };

	qp = MADE(ibv_create_qp(pd, &init));
	return qp->qp_num;
}

static void connect_to(uint32_t qpn)
{
	struct ibv_qp_attr a = { .qp_state = IBV_QPS_INIT, .port_num = 1, .qp_access_flags = IBV_ACCESS_REMOTE_WRITE };

	OK(ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
	a = (struct ibv_qp_attr){ .qp_state = IBV_QPS_RTR, .path_mtu = IBV_MTU_1024, .dest_qp_num = qpn, .max_dest_rd_atomic = 1, .min_rnr_timer = 1,
				  .ah_attr = { .is_global = 1, .port_num = 1, .grh = { .dgid = gid, .hop_limit = 64 } } };
	OK(ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
					 IBV_QP_MIN_RNR_TIMER));
	a = (struct ibv_qp_attr){ .qp_state = IBV_QPS_RTS, .timeout = 14, .retry_cnt = 7, .rnr_retry = 7, .max_rd_atomic = 1 };
	OK(ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC));
}

/* ---- the copier -----------------------------------------------------------------------------------------------------*/

static void post(struct ibv_mr *mr, int len)
{
	struct ibv_sge sge = { (uintptr_t)mr->addr, (uint32_t)len, mr->lkey };
	struct ibv_send_wr wr = { .sg_list = &sge, .num_sge = len ? 1 : 0, .opcode = board->send && len ? IBV_WR_SEND : IBV_WR_RDMA_WRITE }, *bad;

	wr.wr.rdma.remote_addr = board->addr;
	wr.wr.rdma.rkey = board->rkey;
	OK(ibv_post_send(qp, &wr, &bad));
}

static int completion(void)
{
	struct ibv_wc wc;

	while (ibv_poll_cq(cq, 1, &wc) == 0)
		;
	return (int)wc.status;
}

_Noreturn static void copier(void)
{
	ptrace(PTRACE_TRACEME, 0, NULL, NULL);
	open_device();
	pd = MADE(ibv_alloc_pd(ctx));
	struct ibv_mr *mr = MADE(ibv_reg_mr(pd, pages(PAGE, 'B'), PAGE, 0));

	for (;;) {
		board->qpn[0] = make_qp();
		raise(SIGSTOP); /* the parent makes its own */
		connect_to(board->qpn[1]);
		raise(SIGSTOP); /* the parent connects, too */
		post(mr, 0); /* finds the peer */
		OK(completion());
		raise(SIGSTOP); /* from here on in steps */
		post(mr, BYTES);
		raise(SIGSTOP);
		board->status = completion();
		OK(ibv_destroy_qp(qp));
	}
}

/* ---- the owner ------------------------------------------------------------------------------------------------------*/

static pid_t child;

/* Lets the child run, or make one step; false: it is at its next SIGSTOP. Other signals are its own. */
static int pending;

static bool wait_stopped(void)
{
	int status;

	if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status))
		WRONG("the copier ended: status 0x%x", status);
	int sig = WSTOPSIG(status);
	pending = sig == SIGTRAP || sig == SIGSTOP ? 0 : sig;
	return sig != SIGSTOP;
}

static bool resume(enum __ptrace_request how)
{
	if (ptrace(how, child, NULL, (void *)(intptr_t)pending))
		WRONG("ptrace: %s", strerror(errno));
	return wait_stopped();
}

static void to_next_stop(void)
{
	while (resume(PTRACE_CONT))
		;
}

/* One attempt; returns how many steps were made.  With a PD of its own: memory that a late copy may still come to is not used
 * again, and a PD with more and more of it would make the same step another one each time. */
static long attempt(long steps, bool send, char *target, long *landed)
{
	char seen[PAGE];
	long done = 0;

	memset(target, 'A', PAGE);
	pd = MADE(ibv_alloc_pd(ctx));
	board->send = send;
	board->qpn[1] = make_qp();
	connect_to(board->qpn[0]);
	to_next_stop();
	struct ibv_mr *mr = MADE(ibv_reg_mr(pd, target, PAGE, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE)), *fresh;
	struct ibv_sge sge = { (uintptr_t)target, PAGE, mr->lkey };
	struct ibv_recv_wr wr = { .sg_list = &sge, .num_sge = 1 }, *bad;
	if (send)
		OK(ibv_post_recv(qp, &wr, &bad));
	board->rkey = mr->rkey;
	board->addr = (uintptr_t)target;
	to_next_stop();

	bool posting = true;
	while (done < steps && (posting = resume(PTRACE_SINGLESTEP)))
		done++;
	OK(ibv_dereg_mr(mr));
	memcpy(seen, target, PAGE);
	*landed += memchr(seen, 'B', PAGE) != NULL;
	fresh = MADE(ibv_reg_mr(pd, target, PAGE, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE));
	if (posting)
		to_next_stop();
	if (memcmp(seen, target, PAGE))
		WRONG("step %ld of a %s: bytes landed after ibv_dereg_mr", done, send ? "SEND" : "WRITE");
	OK(ibv_destroy_qp(qp));
	OK(ibv_dereg_mr(fresh));
	OK(ibv_dealloc_pd(pd));
	to_next_stop(); /* it has its next QP */
	return done;
}

int main(int argc, char **argv)
{
	long samples = argc > 1 ? atol(argv[1]) : 16, tried = 0, landed = 0, ends = 0, total = 0;
	long part = argc > 4 ? atol(argv[3]) : 0, parts = argc > 4 ? atol(argv[4]) : 1;

	setvbuf(stdout, NULL, _IOLBF, 0);
	srandom(argc > 2 ? (unsigned)strtoul(argv[2], NULL, 0) : 1);
	board = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	child = fork();
	if (child == 0)
		copier();
	if (wait_stopped())
		to_next_stop();
	ptrace(PTRACE_SETOPTIONS, child, NULL, (void *)PTRACE_O_EXITKILL);
	open_device();
	char *target = pages(PAGE, 'A');

	for (int send = 0; send < 2; send++) {
		attempt(1l << 40, send, target, &ends); /* the first one finds nothing prepared */
		long whole = attempt(1l << 40, send, target, &ends);
		/* A sample takes one step at random of each of so many stretches. */
		long stretch = samples ? whole / samples + 1 : 1;

		for (long k = part * stretch; k < whole; k += parts * stretch, tried++)
			attempt(k + random() % stretch, send, target, &landed);
		/* Or its steps would not have been those that were stopped at. */
		long again = 0;
		for (int i = 0; i < 5 && again != whole; i++) /* another thread of the copier's may be in the way once */
			again = attempt(1l << 40, send, target, &ends);
		if (again != whole)
			WRONG("a %s took %ld steps at first, and %ld in the end", send ? "SEND" : "WRITE", whole, again);
		total += whole;
	}
	if (!samples && landed == 0)
		WRONG("no step after the copy was reached");
	printf("revoked %ld steps of %ld, %ld landed before\n", tried, total, landed);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	return 0;
}
