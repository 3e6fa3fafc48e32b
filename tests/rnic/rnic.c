/*
 * A spike: the shape of a link over a physical NIC, on whatever RDMA device there is (the kernel's soft-RoCE).
 *
 *     rnic [LIBIBVERBS]
 *
 * Two sides, each an "application" that has no RDMA device and a "router" that has: the router maps the application's memory where
 * it likes, registers that under the application's own addresses (ibv_reg_mr_iova2), owns the real queue pair, and forwards work
 * requests and completions between shared rings and the NIC without changing an address or a key. libibverbs is loaded at run
 * time, by path: the router must start where there is none. Prints one line per thing shown; exit status 0 if all held.
 */
#include <dlfcn.h>
#include <infiniband/verbs.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #x); exit(1); } } while (0)

enum { PAGE = 4096, RING = 16, SENDS = 0, RECEIVES = 1 };

/* As an application posts it: verbs' own words, its own addresses, the keys that registration gave it. */
struct wqe {
	uint64_t wr_id, addr, remote_addr, compare_add, swap;
	uint32_t opcode, length, lkey, rkey, imm;
};

struct cqe {
	uint64_t wr_id;
	uint32_t status, opcode, byte_len, imm;
};

/* One producer, one consumer each. The consumer copies an entry before it looks at it. */
struct rings {
	struct {
		_Atomic uint32_t made, taken;
		struct wqe at[RING];
	} wq[2];
	struct {
		_Atomic uint32_t made, taken;
		struct cqe at[RING];
	} cq;
};

/* What a router is asked on its socket, and what it answers. */
struct ask {
	enum { REGISTER, DEREGISTER, CONNECT } what;
	uint64_t addr, len, offset[2]; /* of the two halves in the file: neighbours in memory need not be so there */
	uint32_t key, qpn;
	union ibv_gid gid;
};

struct answer {
	uint32_t key, qpn;
	union ibv_gid gid;
};

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

/* ---- the router's side -------------------------------------------------------------------------------------------- */

static void *library;

static void *need(const char *name)
{
	void *f = dlvsym(library, name, "IBVERBS_1.1");
	if (!f)
		f = dlsym(library, name);
	CHECK(f);
	return f;
}
#define VERB(name) ((__typeof__(&name))need(#name))
/* verbs.h has macros of these names. */
#undef ibv_reg_mr
#undef ibv_query_port

struct router {
	struct rings *rings;
	int memory; /* the application's file */
	struct ibv_context *context;
	struct ibv_pd *pd;
	struct ibv_cq *cq;
	struct ibv_qp *qp;
	struct ibv_mr *mr[8];
	void *map[8];
	int gid_index;
};

static void open_nic(struct router *r)
{
	int n;
	struct ibv_device **list = VERB(ibv_get_device_list)(&n);
	CHECK(list && n > 0);
	CHECK((r->context = VERB(ibv_open_device)(list[0])));
	CHECK((r->pd = VERB(ibv_alloc_pd)(r->context)));
	CHECK((r->cq = VERB(ibv_create_cq)(r->context, 4 * RING, NULL, NULL, 0)));
	struct ibv_qp_init_attr init = { .send_cq = r->cq, .recv_cq = r->cq, .qp_type = IBV_QPT_RC,
					 .cap = { RING, RING, 1, 1, 0 }, .sq_sig_all = 1 };
	CHECK((r->qp = VERB(ibv_create_qp)(r->pd, &init)));
	r->gid_index = 1; /* rxe: the RoCE v2 GID of its IPv4 address */
	struct ibv_qp_attr a = { .qp_state = IBV_QPS_INIT, .port_num = 1,
				 .qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC };
	CHECK(!VERB(ibv_modify_qp)(r->qp, &a, IBV_QP_STATE | IBV_QP_PORT | IBV_QP_PKEY_INDEX | IBV_QP_ACCESS_FLAGS));
}

/* Mirrors the application's layout at an address of our own; the NIC is told the application's. */
static uint32_t reg(struct router *r, const struct ask *ask)
{
	uint64_t half = ask->len / 2;
	char *here = mmap(NULL, ask->len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(here != MAP_FAILED && (uint64_t)here != ask->addr);
	for (int i = 0; i < 2; i++)
		CHECK(mmap(here + i * half, half, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, r->memory, ask->offset[i]) !=
		      MAP_FAILED);
	int access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC;
	struct ibv_mr *mr = VERB(ibv_reg_mr_iova2)(r->pd, here, ask->len, ask->addr, access);
	CHECK(mr && mr->lkey == mr->rkey);
	for (int i = 0; i < 8; i++)
		if (!r->mr[i]) {
			r->mr[i] = mr;
			r->map[i] = here;
			return mr->lkey;
		}
	CHECK(!"too many");
	return 0;
}

static void dereg(struct router *r, uint32_t key)
{
	for (int i = 0; i < 8; i++)
		if (r->mr[i] && r->mr[i]->lkey == key) {
			size_t len = r->mr[i]->length;
			CHECK(!VERB(ibv_dereg_mr)(r->mr[i]));
			munmap(r->map[i], len);
			r->mr[i] = NULL;
		}
}

static void connect_nic(struct router *r, const struct ask *ask)
{
	struct ibv_qp_attr a = { .qp_state = IBV_QPS_RTR, .path_mtu = IBV_MTU_1024, .dest_qp_num = ask->qpn, .rq_psn = 7,
				 .max_dest_rd_atomic = 1, .min_rnr_timer = 12,
				 .ah_attr = { .is_global = 1, .port_num = 1,
					      .grh = { .dgid = ask->gid, .sgid_index = r->gid_index, .hop_limit = 64 } } };
	CHECK(!VERB(ibv_modify_qp)(r->qp, &a, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
						      IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER));
	a = (struct ibv_qp_attr){ .qp_state = IBV_QPS_RTS, .timeout = 14, .retry_cnt = 3, .rnr_retry = 7, .sq_psn = 7,
				  .max_rd_atomic = 1 };
	CHECK(!VERB(ibv_modify_qp)(r->qp, &a, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
						      IBV_QP_MAX_QP_RD_ATOMIC));
}

/* Addresses and keys go through as they are: the NIC checks them, for this application's PD. */
static void forward_wqe(struct router *r, int queue, const struct wqe *w)
{
	struct ibv_sge sge = { w->addr, w->length, w->lkey };
	if (queue == RECEIVES) {
		struct ibv_recv_wr wr = { .wr_id = w->wr_id, .sg_list = &sge, .num_sge = 1 }, *bad;
		CHECK(!ibv_post_recv(r->qp, &wr, &bad));
		return;
	}
	struct ibv_send_wr wr = { .wr_id = w->wr_id, .sg_list = &sge, .num_sge = 1, .opcode = w->opcode, .imm_data = w->imm }, *bad;
	if (w->opcode == IBV_WR_ATOMIC_FETCH_AND_ADD || w->opcode == IBV_WR_ATOMIC_CMP_AND_SWP) {
		wr.wr.atomic.remote_addr = w->remote_addr;
		wr.wr.atomic.rkey = w->rkey;
		wr.wr.atomic.compare_add = w->compare_add;
		wr.wr.atomic.swap = w->swap;
	} else {
		wr.wr.rdma.remote_addr = w->remote_addr;
		wr.wr.rdma.rkey = w->rkey;
	}
	CHECK(!ibv_post_send(r->qp, &wr, &bad));
}

static void forward(struct router *r)
{
	for (int queue = SENDS; queue <= RECEIVES; queue++) {
		uint32_t taken = atomic_load(&r->rings->wq[queue].taken);
		while (taken != atomic_load(&r->rings->wq[queue].made)) {
			struct wqe copy = r->rings->wq[queue].at[taken % RING];
			forward_wqe(r, queue, &copy);
			atomic_store(&r->rings->wq[queue].taken, ++taken);
		}
	}
	struct ibv_wc wc;
	while (ibv_poll_cq(r->cq, 1, &wc) > 0) {
		uint32_t made = atomic_load(&r->rings->cq.made);
		r->rings->cq.at[made % RING] = (struct cqe){ wc.wr_id, wc.status, wc.opcode, wc.byte_len, wc.imm_data };
		atomic_store(&r->rings->cq.made, made + 1);
	}
}

static void serve(struct rings *rings, int memory, int socket)
{
	struct router r = { .rings = rings, .memory = memory };
	open_nic(&r);
	struct answer hello = { .qpn = r.qp->qp_num };
	CHECK(!VERB(ibv_query_gid)(r.context, 1, r.gid_index, &hello.gid));
	CHECK(send(socket, &hello, sizeof hello, 0) == sizeof hello);
	for (;;) {
		struct ask ask;
		ssize_t n = recv(socket, &ask, sizeof ask, MSG_DONTWAIT);
		if (n == 0)
			exit(0); /* the application is gone; the kernel destroys the queue pair */
		if (n == sizeof ask) {
			struct answer answer = { 0 };
			if (ask.what == REGISTER)
				answer.key = reg(&r, &ask);
			else if (ask.what == DEREGISTER)
				dereg(&r, ask.key);
			else
				connect_nic(&r, &ask);
			CHECK(send(socket, &answer, sizeof answer, 0) == sizeof answer);
		}
		forward(&r);
	}
}

/* ---- the application's side --------------------------------------------------------------------------------------- */

struct app {
	struct rings *rings;
	int socket, memory;
	pid_t router;
	struct answer hello;
	char *buffer; /* two pages whose places in the file are the other way round, and apart */
	uint32_t key;
};

static struct answer ask_router(struct app *a, struct ask ask)
{
	struct answer answer;
	CHECK(send(a->socket, &ask, sizeof ask, 0) == sizeof ask);
	CHECK(recv(a->socket, &answer, sizeof answer, 0) == sizeof answer);
	return answer;
}

static struct app start(uint64_t at)
{
	struct app a;
	int pair[2], queues = memfd_create("rings", 0);
	a.memory = memfd_create("memory", 0);
	CHECK(!ftruncate(queues, sizeof *a.rings) && !ftruncate(a.memory, 8 * PAGE));
	a.rings = mmap(NULL, sizeof *a.rings, PROT_READ | PROT_WRITE, MAP_SHARED, queues, 0);
	CHECK(a.rings != MAP_FAILED && !socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
	pid_t parent = getpid();
	CHECK((a.router = fork()) >= 0);
	if (a.router == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		CHECK(getppid() == parent);
		close(pair[0]);
		serve(a.rings, a.memory, pair[1]);
	}
	close(pair[1]);
	a.socket = pair[0];
	for (int i = 0; i < 2; i++)
		CHECK(mmap((char *)at + i * PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, a.memory,
			   (5 - 3 * i) * PAGE) == (char *)at + i * PAGE);
	a.buffer = (char *)at;
	CHECK(recv(a.socket, &a.hello, sizeof a.hello, 0) == sizeof a.hello);
	a.key = ask_router(&a, (struct ask){ .what = REGISTER, .addr = at, .len = 2 * PAGE, .offset = { 5 * PAGE, 2 * PAGE } }).key;
	return a;
}

static void post(struct app *a, int queue, struct wqe w)
{
	uint32_t made = atomic_load(&a->rings->wq[queue].made);
	while (made - atomic_load(&a->rings->wq[queue].taken) == RING)
		;
	a->rings->wq[queue].at[made % RING] = w;
	atomic_store(&a->rings->wq[queue].made, made + 1);
}

static struct cqe completion(struct app *a)
{
	double start = now();
	uint32_t taken = atomic_load(&a->rings->cq.taken);
	while (taken == atomic_load(&a->rings->cq.made))
		CHECK(now() - start < 60);
	struct cqe c = a->rings->cq.at[taken % RING];
	atomic_store(&a->rings->cq.taken, taken + 1);
	return c;
}

static void expect(struct app *a, uint64_t wr_id, enum ibv_wc_status status)
{
	struct cqe c = completion(a);
	if (c.wr_id != wr_id || c.status != status)
		fprintf(stderr, "wr %lu ended in %u, not wr %lu in %u\n", c.wr_id, c.status, wr_id, status);
	CHECK(c.wr_id == wr_id && c.status == status);
}

/* `length` bytes from the middle of our buffer, across both its pages, to or from the same place of the peer's. */
static struct wqe request(const struct app *a, const struct app *peer, uint64_t wr_id, enum ibv_wr_opcode op, uint32_t length)
{
	return (struct wqe){ .wr_id = wr_id, .opcode = op, .addr = (uint64_t)a->buffer + PAGE - length / 2, .length = length,
			     .lkey = a->key, .remote_addr = (uint64_t)peer->buffer + PAGE - length / 2, .rkey = peer->key };
}

int main(int argc, char **argv)
{
	const char *path = argc > 1 ? argv[1] : "/usr/lib/x86_64-linux-gnu/libibverbs.so.1";
	library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!library) {
		fprintf(stderr, "%s\n", dlerror());
		return 1;
	}
	/* Both applications live in this one process, at addresses of their own; the routers are its children. */
	struct app a = start(0x7a0000000000), b = start(0x7b0000000000);
	ask_router(&a, (struct ask){ .what = CONNECT, .qpn = b.hello.qpn, .gid = b.hello.gid });
	ask_router(&b, (struct ask){ .what = CONNECT, .qpn = a.hello.qpn, .gid = a.hello.gid });
	enum { N = 600 };
	char *from = a.buffer + PAGE - N / 2, *to = b.buffer + PAGE - N / 2;

	memset(from, 'w', N);
	post(&a, SENDS, request(&a, &b, 1, IBV_WR_RDMA_WRITE, N));
	expect(&a, 1, IBV_WC_SUCCESS);
	CHECK(!memcmp(from, to, N));
	puts("write: the application's own addresses and keys, across two places of its file");

	memset(to, 'r', N);
	post(&a, SENDS, request(&a, &b, 2, IBV_WR_RDMA_READ, N));
	expect(&a, 2, IBV_WC_SUCCESS);
	CHECK(from[0] == 'r' && !memcmp(from, to, N));
	puts("read");

	memset(from, 's', N);
	post(&a, SENDS, request(&a, &b, 3, IBV_WR_SEND, N)); /* no receive: RNR, which the NIC repeats by itself */
	usleep(100000);
	CHECK(to[0] == 'r');
	post(&b, RECEIVES, request(&b, &a, 4, 0, N));
	expect(&b, 4, IBV_WC_SUCCESS);
	expect(&a, 3, IBV_WC_SUCCESS);
	CHECK(!memcmp(from, to, N));
	puts("send before its receive: the NIC's RNR timer, no word between routers");

	struct wqe imm = request(&a, &b, 5, IBV_WR_RDMA_WRITE_WITH_IMM, N);
	imm.imm = 77;
	memset(from, 'i', N);
	post(&b, RECEIVES, request(&b, &a, 6, 0, N));
	post(&a, SENDS, imm);
	struct cqe received = completion(&b);
	CHECK(received.wr_id == 6 && received.imm == 77 && received.byte_len == N && !memcmp(from, to, N));
	expect(&a, 5, IBV_WC_SUCCESS);
	puts("write with immediate");

	*(uint64_t *)b.buffer = 40;
	struct wqe add = request(&a, &b, 7, IBV_WR_ATOMIC_FETCH_AND_ADD, 8);
	add.addr = (uint64_t)a.buffer;
	add.remote_addr = (uint64_t)b.buffer;
	add.compare_add = 2;
	post(&a, SENDS, add);
	expect(&a, 7, IBV_WC_SUCCESS);
	CHECK(*(uint64_t *)a.buffer == 40 && *(uint64_t *)b.buffer == 42);
	puts("atomic, on the page that the application's own processor sees");

	/* After deregistration nothing lands, and who tries learns it from the NIC. */
	memset(to, 'k', N);
	ask_router(&b, (struct ask){ .what = DEREGISTER, .key = b.key });
	post(&a, SENDS, request(&a, &b, 8, IBV_WR_RDMA_WRITE, N));
	expect(&a, 8, IBV_WC_REM_ACCESS_ERR);
	CHECK(to[0] == 'k' && to[N - 1] == 'k');
	post(&a, SENDS, request(&a, &b, 9, IBV_WR_RDMA_WRITE, N));
	expect(&a, 9, IBV_WC_WR_FLUSH_ERR);
	puts("a dead key: REM_ACCESS_ERR, then flush");

	/* A router that dies: its NIC's objects go, and the peer's request ends by its own timeout. */
	struct app c = start(0x7c0000000000), d = start(0x7d0000000000);
	ask_router(&c, (struct ask){ .what = CONNECT, .qpn = d.hello.qpn, .gid = d.hello.gid });
	ask_router(&d, (struct ask){ .what = CONNECT, .qpn = c.hello.qpn, .gid = c.hello.gid });
	post(&c, SENDS, request(&c, &d, 10, IBV_WR_RDMA_WRITE, N));
	expect(&c, 10, IBV_WC_SUCCESS);
	kill(d.router, SIGKILL);
	waitpid(d.router, NULL, 0);
	post(&c, SENDS, request(&c, &d, 11, IBV_WR_RDMA_WRITE, N));
	expect(&c, 11, IBV_WC_RETRY_EXC_ERR);
	puts("a dead router: RETRY_EXC_ERR");
	return 0;
}
