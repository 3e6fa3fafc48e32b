/* Registered memory stays the program's own: through fork, realloc, munmap and madvise, under concurrent writers, and after deregistration. */
#include "common.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>

static size_t page(void)
{
	return (size_t)sysconf(_SC_PAGESIZE);
}

static uint8_t *anonymous(size_t len)
{
	uint8_t *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(p != MAP_FAILED, "mmap");
	return p;
}

/* Tells A where B's memory is. */
static void aim(struct pair *p, const void *addr, const struct ibv_mr *mr)
{
	uint64_t at = from_b((uintptr_t)addr), key = from_b(mr ? mr->rkey : 0);

	if (p->a) {
		p->a->peer.addr = at;
		p->a->peer.rkey = (uint32_t)key;
	}
}

/* A writes len bytes of `stream` at B's memory + off, and both wait for it. */
static void write_stream(struct pair *p, size_t off, size_t len, uint64_t stream)
{
	if (p->a) {
		fill(p->a->buf, len, stream);
		OK(post_op(p->a, IBV_WR_RDMA_WRITE, stream, 0, len, off, 0));
		WANT(p->a->scq, stream, IBV_WC_SUCCESS);
	}
	sync_ends();
}

/* A writes where B no longer has the memory it registered: whatever the status, nothing crashes.  The QP may be lost. */
static void write_into_nothing(struct pair *p)
{
	if (p->a) {
		OK(post_op(p->a, IBV_WR_RDMA_WRITE, 1, 0, 512, 0, 0));
		EQ(WAIT(p->a->scq).wr_id, 1);
	}
	sync_ends();
}

/* ---- fork -------------------------------------------------------------------------------------------------------- */

static void exited_well(pid_t child)
{
	int status = 0;

	EQ(waitpid(child, &status, 0), child);
	CHECK(WIFEXITED(status), "the child died of signal %d", WTERMSIG(status));
	EQ(WEXITSTATUS(status), 0);
}

/* The child writes over every registered page and its neighbours; the parent sees nothing of it. */
static void fork_child_overwrites(void)
{
	struct pair p = pair_open(NULL, NULL);
	size_t len = 16 * page(), inner = len - 4 * page();
	uint8_t *heap = MADE(malloc(len)), *map = anonymous(len);
	struct ibv_mr *on_heap = NULL, *on_map = NULL;

	fill(heap, len, 1);
	fill(map, len, 2);
	if (p.b) {
		on_heap = MADE(ibv_reg_mr(p.b->pd, heap + page() + 77, inner, ALL_ACCESS));
		on_map = MADE(ibv_reg_mr(p.b->pd, map + 2 * page(), inner, ALL_ACCESS));
	}
	SAME(heap, len, 1);
	pid_t child = fork();
	CHECK(child >= 0, "fork");
	if (!child) {
		bool intact = same(heap, len, 1) && same(map, len, 2);

		memset(heap, 0xcc, len);
		memset(map, 0xdd, len);
		_exit(intact ? 0 : 1);
	}
	exited_well(child);
	SAME(heap, len, 1);
	SAME(map, len, 2);
	aim(&p, map + 2 * page(), on_map);
	write_stream(&p, 0, 4096, 3);
	if (p.b) {
		SAME(map + 2 * page(), 4096, 3);
		OK(ibv_dereg_mr(on_heap));
		OK(ibv_dereg_mr(on_map));
		SAME(heap, len, 1);
		SAME(map + 2 * page(), 4096, 3);
	}
	free(heap);
	EQ(munmap(map, len), 0);
}

/* While the child lives, what arrives by RDMA is seen by the parent only. */
static void fork_child_is_apart(void)
{
	struct pair p = pair_open(NULL, NULL);
	uint8_t *map = anonymous(4 * page());
	struct ibv_mr *mr = p.b ? MADE(ibv_reg_mr(p.b->pd, map, 4 * page(), ALL_ACCESS)) : NULL;
	int go[2];
	char byte = 0;

	EQ(pipe2(go, O_CLOEXEC), 0);
	fill(map, 4 * page(), 1);
	pid_t child = fork();
	CHECK(child >= 0, "fork");
	if (!child) {
		close(go[1]);
		bool told = read(go[0], &byte, 1) == 1;

		_exit(told && same(map, 4 * page(), 1) ? 0 : 1);
	}
	aim(&p, map, mr);
	write_stream(&p, 100, 2000, 5);
	if (p.b)
		SAME(map + 100, 2000, 5);
	EQ(write(go[1], &byte, 1), 1);
	exited_well(child);
	close(go[0]);
	close(go[1]);
	if (p.b)
		OK(ibv_dereg_mr(mr));
	EQ(munmap(map, 4 * page()), 0);
}

/* A child that starts another program, as popen and system do. */
static void fork_and_exec(void)
{
	struct pair p = pair_open(NULL, NULL);

	EQ(system("exit 7"), 7 << 8);
	FILE *f = MADE(popen("echo hello", "r"));
	char line[16] = "";
	CHECK(fgets(line, sizeof(line), f) && !strcmp(line, "hello\n"), "got %s", line);
	EQ(pclose(f), 0);
	write_stream(&p, 0, 1000, 2);
	if (p.b)
		SAME(p.b->buf, 1000, 2);
}

/* A forked child that allocates, frees and exits through the C library. */
static void fork_child_uses_the_heap(void)
{
	struct pair p = pair_open(NULL, NULL);
	pid_t child = fork();

	CHECK(child >= 0, "fork");
	if (!child) {
		for (size_t i = 1; i < 2000; i++) {
			uint8_t *block = malloc(i * 37);

			if (!block)
				_exit(1);
			memset(block, 0x3c, i * 37);
			free(block);
		}
		_exit(0);
	}
	exited_well(child);
	write_stream(&p, 0, 1000, 2);
	if (p.b) {
		SAME(p.b->buf, 1000, 2);
		MARGINS(p.b);
	}
}

/* ---- the mapping changes under a registration --------------------------------------------------------------------- */

static void unmap_under_registration(void)
{
	struct pair p = pair_open(NULL, NULL);
	uint8_t *map = anonymous(4 * page());
	struct ibv_mr *mr = p.b ? MADE(ibv_reg_mr(p.b->pd, map, 4 * page(), ALL_ACCESS)) : NULL;

	aim(&p, map, mr);
	write_stream(&p, 0, 512, 4);
	EQ(munmap(map, 4 * page()), 0);
	sync_ends();
	write_into_nothing(&p);
	if (p.b)
		OK(ibv_dereg_mr(mr));
}

/* New memory at the old address is not what was registered: nothing arrives in it, and deregistering leaves it alone. */
static void remap_under_registration(void)
{
	struct pair p = pair_open(NULL, NULL);
	size_t len = 4 * page();
	uint8_t *map = anonymous(len);
	struct ibv_mr *mr = p.b ? MADE(ibv_reg_mr(p.b->pd, map, len, ALL_ACCESS)) : NULL;

	aim(&p, map, mr);
	write_stream(&p, 0, 512, 4);
	EQ(munmap(map, len), 0);
	CHECK(mmap(map, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == map, "mmap");
	memset(map, 0x42, len);
	sync_ends();
	if (p.a)
		fill(p.a->buf, 512, 4);
	write_into_nothing(&p);
	if (p.b) {
		ALL(map, len, 0x42);
		OK(ibv_dereg_mr(mr));
	}
	ALL(map, len, 0x42);
	/* a registration of the new memory is as good as any */
	struct pair q = pair_open(NULL, NULL);
	mr = q.b ? MADE(ibv_reg_mr(q.b->pd, map, len, ALL_ACCESS)) : NULL;
	aim(&q, map, mr);
	write_stream(&q, 7, 512, 9);
	if (q.b) {
		SAME(map + 7, 512, 9);
		OK(ibv_dereg_mr(mr));
	}
	EQ(munmap(map, len), 0);
}

/* MADV_DONTNEED on private memory: it reads zero, and works on. */
static void dontneed_under_registration(void)
{
	struct pair p = pair_open(NULL, NULL);
	size_t len = 8 * page();
	uint8_t *map = anonymous(len);
	struct ibv_mr *mr = p.b ? MADE(ibv_reg_mr(p.b->pd, map, len, ALL_ACCESS)) : NULL;

	memset(map, 0x42, len);
	EQ(madvise(map + page(), 2 * page(), MADV_DONTNEED), 0);
	ALL(map, page(), 0x42);
	ALL(map + page(), 2 * page(), 0);
	ALL(map + 3 * page(), 5 * page(), 0x42);
	memset(map + page(), 0x43, page());
	aim(&p, map, mr);
	write_into_nothing(&p);
	ALL(map + page(), page(), 0x43);
	if (p.b)
		OK(ibv_dereg_mr(mr));
	ALL(map + page(), page(), 0x43);
	ALL(map + 3 * page(), 5 * page(), 0x42);
	EQ(munmap(map, len), 0);
}

/* Growing moves the bytes along, and every byte of the new block can be touched. */
static void realloc_under_registration(void)
{
	static const size_t FROM[] = { 1000, 20000, 300000, 3000000 };
	struct pair p = pair_open(NULL, NULL);

	for (size_t i = 0; i < COUNT(FROM); i++)
		for (size_t times = 2; times <= 16; times *= 8) {
			uint8_t *block = MADE(malloc(FROM[i]));
			struct ibv_mr *mr = p.b ? MADE(ibv_reg_mr(p.b->pd, block, FROM[i], ALL_ACCESS)) : NULL;

			fill(block, FROM[i], i);
			block = MADE(realloc(block, FROM[i] * times));
			SAME(block, FROM[i], i);
			memset(block + FROM[i], 0x31, FROM[i] * (times - 1));
			SAME(block, FROM[i], i);
			if (mr)
				OK(ibv_dereg_mr(mr));
			SAME(block, FROM[i], i);
			ALL(block + FROM[i], FROM[i] * (times - 1), 0x31);
			block = MADE(realloc(block, FROM[i] / 2));
			SAME(block, FROM[i] / 2, i);
			free(block);
		}
}

static void mremap_under_registration(void)
{
	struct pair p = pair_open(NULL, NULL);
	size_t len = 8 * page();
	uint8_t *map = anonymous(len);
	struct ibv_mr *mr = p.b ? MADE(ibv_reg_mr(p.b->pd, map, len, ALL_ACCESS)) : NULL;

	fill(map, len, 1);
	uint8_t *grown = mremap(map, len, 4 * len, MREMAP_MAYMOVE);
	if (grown == MAP_FAILED)
		FAIL("mremap: %s", strerror(errno));
	SAME(grown, len, 1);
	memset(grown + len, 0x55, 3 * len); /* a fault here kills the program */
	SAME(grown, len, 1);
	if (mr)
		OK(ibv_dereg_mr(mr));
	SAME(grown, len, 1);
	ALL(grown + len, 3 * len, 0x55);
	EQ(munmap(grown, 4 * len), 0);
}

/* Freeing without deregistering, as careless programs do, and using the heap again. */
static void free_under_registration(void)
{
	struct pair p = pair_open(NULL, NULL);
	struct ibv_mr *mr[32] = { NULL };

	for (size_t i = 0; i < COUNT(mr); i++) {
		size_t len = 100 + 7000 * i;
		uint8_t *block = MADE(malloc(len));

		if (p.b)
			mr[i] = MADE(ibv_reg_mr(p.b->pd, block, len, ALL_ACCESS));
		memset(block, 0x77, len);
		free(block);
		block = MADE(malloc(len));
		memset(block, 0x66, len);
		ALL(block, len, 0x66);
		free(block);
	}
	for (size_t i = 0; p.b && i < COUNT(mr); i++)
		OK(ibv_dereg_mr(mr[i]));
}

/* ---- concurrent writers ------------------------------------------------------------------------------------------ */

enum { WRITERS = 2, CELLS = 4 * 4096 / 8 };

struct writer {
	pthread_t thread;
	volatile uint64_t *cells; /* this thread's are those with index % WRITERS == own */
	size_t own;
	uint64_t rounds;
	const volatile int *stop;
};

static void *keep_writing(void *arg)
{
	struct writer *w = arg;

	while (!__atomic_load_n(w->stop, __ATOMIC_RELAXED)) {
		w->rounds++;
		for (size_t i = w->own; i < CELLS; i += WRITERS) {
			CHECK(w->cells[i] == w->rounds - 1, "cell %zu lost a write: %" PRIu64 ", not %" PRIu64, i, w->cells[i], w->rounds - 1);
			w->cells[i] = w->rounds;
		}
	}
	return NULL;
}

/* Registration and deregistration while other threads write to the same pages: every write is there. */
static void writers_during_registration(void)
{
	struct ibv_pd *pd = MADE(ibv_alloc_pd(ctx));
	uint8_t *map = anonymous(CELLS * 8);
	static volatile int stop; /* both outlive a failure of the main thread */
	static struct writer w[WRITERS];

	for (size_t i = 0; i < WRITERS; i++) {
		w[i] = (struct writer){ .cells = (volatile uint64_t *)(void *)map, .own = i, .stop = &stop };
		EQ(pthread_create(&w[i].thread, NULL, keep_writing, &w[i]), 0);
	}
	for (size_t i = 0; i < 300; i++) {
		size_t off = 8 * (i % 100);
		struct ibv_mr *mr = MADE(ibv_reg_mr(pd, map + off, CELLS * 8 - 2 * off, ALL_ACCESS));

		OK(ibv_dereg_mr(mr));
	}
	__atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
	for (size_t i = 0; i < WRITERS; i++)
		EQ(pthread_join(w[i].thread, NULL), 0);
	for (size_t i = 0; i < CELLS; i++)
		EQ(((uint64_t *)map)[i], w[i % WRITERS].rounds);
	OK(ibv_dealloc_pd(pd));
	EQ(munmap(map, CELLS * 8), 0);
}

struct registrar {
	struct end *b;
	uint8_t *map;
	size_t len;
	volatile int stop;
};

static void *keep_registering(void *arg)
{
	struct registrar *r = arg;
	uint64_t rnd = seed;

	while (!__atomic_load_n(&r->stop, __ATOMIC_RELAXED)) {
		size_t off = next_random(&rnd) % r->len, len = 1 + next_random(&rnd) % (r->len - off);
		struct ibv_mr *mr = MADE(ibv_reg_mr(r->b->pd, r->map + off, len, ALL_ACCESS));

		OK(ibv_dereg_mr(mr));
	}
	return NULL;
}

/* What arrives by RDMA while overlapping regions come and go is not lost either. */
static void arrivals_during_registration(void)
{
	struct end_cfg c = { .len = 8192 };
	struct pair p = pair_open(&c, &c);
	static struct registrar r; /* outlives a failure of the main thread */
	r = (struct registrar){ p.b, anonymous(8 * page()), 8 * page(), 0 };
	struct ibv_mr *mr = p.b ? MADE(ibv_reg_mr(p.b->pd, r.map, r.len, ALL_ACCESS)) : NULL;
	pthread_t thread;

	aim(&p, r.map, mr);
	if (p.b)
		EQ(pthread_create(&thread, NULL, keep_registering, &r), 0);
	for (uint64_t i = 0; i < 300; i++) {
		write_stream(&p, (i % 4) * 8192, 8192, i);
		if (p.b)
			SAME(r.map + (i % 4) * 8192, 8192, i);
		sync_ends();
	}
	if (p.b) {
		__atomic_store_n(&r.stop, 1, __ATOMIC_RELAXED);
		EQ(pthread_join(thread, NULL), 0);
		for (uint64_t i = 296; i < 300; i++)
			SAME(r.map + (i % 4) * 8192, 8192, i);
		OK(ibv_dereg_mr(mr));
	}
	EQ(munmap(r.map, r.len), 0);
}

/* ---- ordinary memory --------------------------------------------------------------------------------------------- */

/* System calls read and write registered memory like any other. */
static void system_calls_on_registered_memory(void)
{
	struct pair p = pair_open(NULL, NULL);
	size_t len = 8 * page();
	uint8_t *map = anonymous(len);
	struct ibv_mr *mr = p.b ? MADE(ibv_reg_mr(p.b->pd, map + 100, len - 200, ALL_ACCESS)) : NULL;
	FILE *f = MADE(tmpfile());

	fill(map, len, 1);
	EQ(pwrite(fileno(f), map, len, 0), (ssize_t)len);
	memset(map, 0, len);
	EQ(pread(fileno(f), map, len, 0), (ssize_t)len);
	SAME(map, len, 1);
	fclose(f);
	if (mr)
		OK(ibv_dereg_mr(mr));
	SAME(map, len, 1);
	EQ(munmap(map, len), 0);
}

/* After deregistration: bytes kept, and fork, madvise and munmap do what they do to any memory. */
static void ordinary_after_deregistration(void)
{
	struct pair p = pair_open(NULL, NULL);
	size_t len = 8 * page();
	uint8_t *map = anonymous(len);
	struct ibv_mr *mr = p.b ? MADE(ibv_reg_mr(p.b->pd, map + 64, len - 128, ALL_ACCESS)) : NULL;

	fill(map, len, 1);
	aim(&p, map + 64, mr); /* from here on A may write */
	write_stream(&p, 0, 4096, 2);
	if (p.b) {
		SAME(map + 64, 4096, 2);
		OK(ibv_dereg_mr(mr));
		SAME(map + 64, 4096, 2);
	}
	fill(map, len, 3);
	pid_t child = fork();
	CHECK(child >= 0, "fork");
	if (!child) {
		memset(map, 0, len);
		_exit(0);
	}
	exited_well(child);
	SAME(map, len, 3);
	EQ(madvise(map, len, MADV_DONTNEED), 0);
	ALL(map, len, 0);
	EQ(munmap(map, len), 0);
}

#define CASE(name) { #name, name, 0 }
static const struct test_case cases[] = {
	CASE(fork_child_overwrites), CASE(fork_child_is_apart), CASE(fork_and_exec), CASE(fork_child_uses_the_heap),
	CASE(unmap_under_registration), CASE(remap_under_registration), CASE(dontneed_under_registration), CASE(realloc_under_registration),
	CASE(mremap_under_registration), CASE(free_under_registration),
	{ "writers_during_registration", writers_during_registration, LOCAL },
	CASE(arrivals_during_registration), CASE(system_calls_on_registered_memory), CASE(ordinary_after_deregistration),
};
SUITE(cases)
