/*
 * A verbs program with many queue pairs under load, for the soaks.  One thread, one CQ, one completion channel, one PD.
 *
 *     worker SEED sleep|spin [wary]
 *
 * Orders, one per line:                                    answers:
 *     make SLOT load|far|ping|echo                         made SLOT QPN RKEY ADDR GID
 *     join SLOT QPN RKEY ADDR GID                          joined SLOT          (RTS, receives are posted)
 *     go SLOT                                              none: requests flow until the QP fails or is broken
 *     patience TIMEOUT RETRIES                             patient              (attributes of QPs that join from now on)
 *     count                                                counts N...          (completed requests of each slot)
 *     gap                                                  gap US               (longest wait for a pong since the last)
 *     show                                                 shows SLOT:SENDS:RECEIVES:STATE...  (work requests out)
 *     break SLOT                                           broken SLOT          (its QP, MR are gone)
 *     quit                                                 none; exit status 0 if everything could be given back
 *
 * What happens by itself:
 *     failed SLOT STATUS          first completion in error of a QP
 *     event SLOT NUMBER           asynchronous event
 *     flushed SLOT                a failed QP has given every work request back
 *     wrong TEXT                  something that no peer may cause: then it exits with status 1
 *
 * A load slot keeps WINDOW random operations going; far is the same with memory that cannot move.  SENDs and
 * WRITEs with immediate carry a sequence number, which the receiving end checks.  ping sends one small message per
 * millisecond and waits for its echo.  A wary worker has a hostile peer and believes nothing that arrives.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { SLOTS = 8, WINDOW = 4, RECEIVES = 16, MESSAGE = 16384, AREA = 65536, BUF = AREA * 2 + RECEIVES * MESSAGE + WINDOW * MESSAGE };
/* In a slot's memory: what peers write and read, what we read from them into, receives, what is sent. */
enum { LANDING = AREA, RECEIVE_AT = AREA * 2, SEND_AT = RECEIVE_AT + RECEIVES * MESSAGE };
enum kind { LOAD, FAR, PING, ECHO };

struct slot {
	bool used, going, failed, flushed, waiting;
	enum kind kind;
	char *buf;
	struct ibv_mr *mr;
	struct ibv_qp *qp;
	uint32_t peer_rkey;
	uint64_t peer_addr, count;
	uint32_t sent, expected;
	int sends, receives;
	double due, since;
};

static struct slot slots[SLOTS];
static struct ibv_context *ctx;
static struct ibv_pd *pd;
static struct ibv_cq *cq;
static struct ibv_comp_channel *channel;
static union ibv_gid gid;
static uint64_t dice;
static bool wary;
static int timeout = 18, retries = 7;
static double longest;

static void say(const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	vprintf(fmt, args);
	va_end(args);
	putchar('\n');
	fflush(stdout);
}

#define WRONG(...) (say("wrong " __VA_ARGS__), exit(1))
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

static uint64_t roll(void) /* splitmix64 */
{
	uint64_t z = (dice += 0x9e3779b97f4a7c15u);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return z ^ (z >> 31);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- objects --------------------------------------------------------------------------------------------------------*/

static void open_device(void)
{
	struct ibv_device **list = MADE(ibv_get_device_list(NULL));

	if (!list[0])
		WRONG("no device");
	ctx = MADE(ibv_open_device(list[0]));
	ibv_free_device_list(list);
	OK(ibv_query_gid(ctx, 1, 0, &gid));
	pd = MADE(ibv_alloc_pd(ctx));
	channel = MADE(ibv_create_comp_channel(ctx));
	cq = MADE(ibv_create_cq(ctx, SLOTS * (WINDOW + RECEIVES), NULL, channel, 0));
	fcntl(ctx->async_fd, F_SETFL, fcntl(ctx->async_fd, F_GETFL) | O_NONBLOCK);
	fcntl(channel->fd, F_SETFL, fcntl(channel->fd, F_GETFL) | O_NONBLOCK);
	/* Memory is for good: only registrations come and go. FAR's cannot move. */
	for (int i = 0; i < SLOTS; i++) {
		int flags = MAP_ANONYMOUS | (i == SLOTS - 1 ? MAP_SHARED : MAP_PRIVATE);

		slots[i].buf = mmap(NULL, BUF, PROT_READ | PROT_WRITE, flags, -1, 0);
		if (slots[i].buf == MAP_FAILED)
			WRONG("mmap: %s", strerror(errno));
		memset(slots[i].buf, i, BUF);
	}
}

static struct slot *slot_at(int i)
{
	if (i < 0 || i >= SLOTS)
		WRONG("no slot %d", i);
	return &slots[i];
}

static void make(int i, const char *kind)
{
	struct slot *s = slot_at(i);
	char *buf = s->buf;
	int access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;

	if (s->used)
		WRONG("slot %d is in use", i);
	*s = (struct slot){ .used = true, .buf = buf };
	s->kind = !strcmp(kind, "load") ? LOAD : !strcmp(kind, "far") ? FAR : !strcmp(kind, "ping") ? PING : ECHO;
	if ((s->kind == FAR) != (i == SLOTS - 1))
		WRONG("the last slot, and no other, is for far");
	if (s->kind != FAR)
		access |= IBV_ACCESS_REMOTE_ATOMIC;
	s->mr = MADE(ibv_reg_mr(pd, buf, BUF, access));
	struct ibv_qp_init_attr init = { .send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC, .sq_sig_all = 1, .qp_context = s,
					 .cap = { .max_send_wr = WINDOW, .max_recv_wr = RECEIVES, .max_send_sge = 1, .max_recv_sge = 1 } };
	s->qp = MADE(ibv_create_qp(pd, &init));
	char text[INET6_ADDRSTRLEN];
	inet_ntop(AF_INET6, gid.raw, text, sizeof(text));
	say("made %d %u %u %" PRIuPTR " %s", i, s->qp->qp_num, s->mr->rkey, (uintptr_t)buf, text);
}

static void post_receive(struct slot *s, uint64_t n)
{
	struct ibv_sge sge = { (uintptr_t)s->buf + RECEIVE_AT + n * MESSAGE, MESSAGE, s->mr->lkey };
	struct ibv_recv_wr wr = { .wr_id = (uint64_t)(s - slots) << 32 | n, .sg_list = &sge, .num_sge = 1 }, *bad;

	OK(ibv_post_recv(s->qp, &wr, &bad));
	s->receives++;
}

static void join(int i, uint32_t qpn, uint32_t rkey, uint64_t addr, const char *text)
{
	struct slot *s = slot_at(i);
	struct ibv_qp_attr a = { .qp_state = IBV_QPS_INIT, .port_num = 1,
				 .qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC };

	OK(ibv_modify_qp(s->qp, &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
	a = (struct ibv_qp_attr){ .qp_state = IBV_QPS_RTR, .path_mtu = IBV_MTU_1024, .dest_qp_num = qpn, .max_dest_rd_atomic = 1, .min_rnr_timer = 1,
				  .ah_attr = { .is_global = 1, .port_num = 1, .grh = { .hop_limit = 64 } } };
	if (inet_pton(AF_INET6, text, a.ah_attr.grh.dgid.raw) != 1)
		WRONG("bad gid %s", text);
	OK(ibv_modify_qp(s->qp, &a, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
					    IBV_QP_MIN_RNR_TIMER));
	a = (struct ibv_qp_attr){ .qp_state = IBV_QPS_RTS, .timeout = (uint8_t)timeout, .retry_cnt = (uint8_t)retries, .rnr_retry = 7, .max_rd_atomic = 1 };
	OK(ibv_modify_qp(s->qp, &a, IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC));
	s->peer_rkey = rkey;
	s->peer_addr = addr;
	for (uint64_t n = 0; n < RECEIVES; n++)
		post_receive(s, n);
	say("joined %d", i);
}

static void break_up(int i)
{
	struct slot *s = slot_at(i);

	OK(ibv_destroy_qp(s->qp));
	OK(ibv_dereg_mr(s->mr));
	s->used = false;
	say("broken %d", i);
}

/* ---- traffic --------------------------------------------------------------------------------------------------------*/

static void post_one(struct slot *s, enum ibv_wr_opcode op, uint32_t len, uint64_t n)
{
	struct ibv_sge sge = { (uintptr_t)s->buf + SEND_AT + n * MESSAGE, len, s->mr->lkey };
	struct ibv_send_wr wr = { .wr_id = (uint64_t)(s - slots) << 32 | 1u << 31 | n, .sg_list = &sge, .num_sge = 1, .opcode = op }, *bad;
	uint64_t room = AREA - MESSAGE;

	if (op == IBV_WR_RDMA_READ || op == IBV_WR_ATOMIC_FETCH_AND_ADD || op == IBV_WR_ATOMIC_CMP_AND_SWP)
		sge.addr = (uintptr_t)s->buf + LANDING + n * MESSAGE;
	if (op == IBV_WR_ATOMIC_FETCH_AND_ADD || op == IBV_WR_ATOMIC_CMP_AND_SWP) {
		sge.length = 8;
		wr.wr.atomic.remote_addr = s->peer_addr + (roll() % room & ~7ull);
		wr.wr.atomic.rkey = s->peer_rkey;
		wr.wr.atomic.compare_add = roll();
	} else {
		wr.wr.rdma.remote_addr = s->peer_addr + roll() % room;
		wr.wr.rdma.rkey = s->peer_rkey;
	}
	if (op == IBV_WR_SEND_WITH_IMM || op == IBV_WR_RDMA_WRITE_WITH_IMM)
		wr.imm_data = htonl(s->sent++);
	OK(ibv_post_send(s->qp, &wr, &bad));
	s->sends++;
}

static void post_random(struct slot *s, uint64_t n)
{
	static const enum ibv_wr_opcode ops[] = { IBV_WR_SEND_WITH_IMM, IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_RDMA_WRITE, IBV_WR_RDMA_READ,
						  IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_ATOMIC_CMP_AND_SWP };
	/* Short ones as likely as long ones. */
	uint32_t len = (uint32_t)(1 + roll() % (1u << roll() % 15));

	post_one(s, ops[roll() % (s->kind == FAR ? 4 : 6)], len, n);
}

static void go(int i)
{
	struct slot *s = slot_at(i);

	s->going = true;
	s->due = now();
	if (s->kind == LOAD || s->kind == FAR)
		for (uint64_t n = 0; n < WINDOW && !s->failed; n++)
			post_random(s, n);
}

static void next_ping(struct slot *s, double t)
{
	if (s->kind != PING || !s->going || s->failed || s->waiting || t < s->due)
		return;
	s->waiting = true;
	s->since = t;
	s->due = t + 0.001;
	post_one(s, IBV_WR_SEND_WITH_IMM, 8, 0);
}

static void received(struct slot *s, const struct ibv_wc *wc)
{
	s->receives--;
	if (wc->status)
		return;
	if (ntohl(wc->imm_data) != s->expected++ && !wary)
		WRONG("slot %d got message %u, not %u", (int)(s - slots), ntohl(wc->imm_data), s->expected - 1);
	if (s->failed)
		return;
	post_receive(s, (uint32_t)wc->wr_id);
	if (s->kind == ECHO)
		post_one(s, IBV_WR_SEND_WITH_IMM, 8, 0);
	if (s->kind == PING) {
		double waited = now() - s->since;

		s->waiting = false;
		s->count++;
		longest = waited > longest ? waited : longest;
	}
}

static void completed(const struct ibv_wc *wc)
{
	struct slot *s = slot_at((int)(wc->wr_id >> 32));
	bool send = wc->wr_id & 1u << 31;

	if (!s->used)
		WRONG("a completion of a queue pair that is gone");
	if (wc->status && !s->failed) {
		s->failed = true;
		say("failed %d %s", (int)(s - slots), ibv_wc_status_str(wc->status));
	}
	if (!send)
		return received(s, wc);
	s->sends--;
	if (wc->status)
		return;
	if (s->kind == LOAD || s->kind == FAR) {
		s->count++;
		if (!s->failed)
			post_random(s, wc->wr_id & 0x7fffffff);
	}
}

/* Returns whether there was anything. */
static bool drain(void)
{
	struct ibv_wc wc[8];
	int n = ibv_poll_cq(cq, 8, wc);

	if (n < 0)
		WRONG("ibv_poll_cq: %d", n);
	for (int k = 0; k < n; k++)
		completed(&wc[k]);
	for (int i = 0; i < SLOTS; i++) {
		struct slot *s = &slots[i];

		if (s->used && s->failed && !s->flushed && !s->sends && !s->receives) {
			s->flushed = true;
			say("flushed %d", i);
		}
	}
	return n > 0;
}

static void take_event(void)
{
	struct ibv_async_event e;

	if (ibv_get_async_event(ctx, &e))
		return;
	if (e.event_type >= IBV_EVENT_DEVICE_FATAL)
		WRONG("event %s", ibv_event_type_str(e.event_type));
	say("event %d %d", (int)((struct slot *)e.element.qp->qp_context - slots), e.event_type);
	ibv_ack_async_event(&e);
}

/* ---- orders ---------------------------------------------------------------------------------------------------------*/

static void quit(void)
{
	for (int i = 0; i < SLOTS; i++)
		if (slots[i].used)
			break_up(i);
	OK(ibv_destroy_cq(cq));
	OK(ibv_destroy_comp_channel(channel));
	OK(ibv_dealloc_pd(pd));
	OK(ibv_close_device(ctx));
	exit(0);
}

static void show(void)
{
	printf("shows");
	for (int i = 0; i < SLOTS; i++) {
		struct ibv_qp_attr a;
		struct ibv_qp_init_attr init;

		if (!slots[i].used)
			continue;
		OK(ibv_query_qp(slots[i].qp, &a, IBV_QP_STATE, &init));
		printf(" %d:%d:%d:%d", i, slots[i].sends, slots[i].receives, a.qp_state);
	}
	say("");
}

static void obey(const char *line)
{
	int i;
	char word[64];
	uint32_t qpn, rkey;
	uint64_t addr;

	if (sscanf(line, "make %d %63s", &i, word) == 2) {
		make(i, word);
	} else if (sscanf(line, "join %d %u %u %" SCNu64 " %63s", &i, &qpn, &rkey, &addr, word) == 5) {
		join(i, qpn, rkey, addr, word);
	} else if (sscanf(line, "go %d", &i) == 1) {
		go(i);
	} else if (sscanf(line, "break %d", &i) == 1) {
		break_up(i);
	} else if (sscanf(line, "patience %d %d", &timeout, &retries) == 2) {
		say("patient");
	} else if (!strcmp(line, "count")) {
		printf("counts");
		for (i = 0; i < SLOTS; i++)
			printf(" %" PRIu64, slots[i].count);
		say("");
	} else if (!strcmp(line, "show")) {
		show();
	} else if (!strcmp(line, "gap")) {
		for (i = 0; i < SLOTS; i++)
			if (slots[i].waiting && now() - slots[i].since > longest)
				longest = now() - slots[i].since;
		say("gap %.0f", longest * 1e6);
		longest = 0;
	} else if (!strcmp(line, "quit")) {
		quit();
	} else {
		WRONG("order %s", line);
	}
}

static void take_orders(void)
{
	static char text[4096];
	static size_t len;
	ssize_t n = read(0, text + len, sizeof(text) - len - 1);

	if (n <= 0)
		exit(n ? 1 : 0);
	len += (size_t)n;
	text[len] = 0;
	for (char *end; (end = memchr(text, '\n', len));) {
		*end = 0;
		obey(text);
		len -= (size_t)(end + 1 - text);
		memmove(text, end + 1, len + 1);
	}
}

static bool pinging(void)
{
	for (int i = 0; i < SLOTS; i++)
		if (slots[i].used && slots[i].kind == PING && slots[i].going && !slots[i].failed && !slots[i].waiting)
			return true;
	return false;
}

int main(int argc, char **argv)
{
	bool spin = argc > 2 && !strcmp(argv[2], "spin");
	unsigned drained = 0, looked = 0;

	wary = argc > 3 && !strcmp(argv[3], "wary");
	dice = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
	open_device();
	say("ready");
	for (;;) {
		struct pollfd fds[] = { { 0, POLLIN, 0 }, { ctx->async_fd, POLLIN, 0 }, { channel->fd, POLLIN, 0 } };
		struct ibv_cq *rung;
		void *cookie;
		bool busy;

		if (!spin)
			OK(ibv_req_notify_cq(cq, 0));
		do {
			busy = drain();
		} while (busy && ++drained % 64);
		for (int i = 0; i < SLOTS; i++)
			if (slots[i].used)
				next_ping(&slots[i], now());
		if (spin && ++looked % 64)
			continue;
		if (poll(fds, 3, spin || busy ? 0 : pinging() ? 1 : -1) < 0 && errno != EINTR)
			WRONG("poll: %s", strerror(errno));
		if (fds[2].revents && !ibv_get_cq_event(channel, &rung, &cookie))
			ibv_ack_cq_events(rung, 1);
		if (fds[1].revents)
			take_event();
		if (fds[0].revents)
			take_orders();
	}
}
