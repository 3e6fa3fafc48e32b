/* Registers what malloc gives, small and large, while other threads allocate from the same heaps and processes are
 * started. Linked with glibc's malloc or with jemalloc. */
#include <assert.h>
#include <infiniband/verbs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MUST(x) ((x) ? (void)0 : (fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #x), abort()))
enum { THREADS = 3, KEPT = 100, LIVE = 12, ROUNDS = 600 };
static const int ACCESS = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
static atomic_int stop;

struct block {
	unsigned char *bytes, value;
	size_t size;
	struct ibv_mr *mr;
};

static size_t some_size(unsigned *seed)
{
	unsigned pick = rand_r(seed);
	return pick % 16 ? 1 + pick % 9000 : 1 + pick % (3 << 20);
}

static struct block fresh(unsigned *seed)
{
	struct block b = { .size = some_size(seed), .value = rand_r(seed) };
	MUST((b.bytes = malloc(b.size)));
	memset(b.bytes, b.value, b.size);
	return b;
}

static void check(const struct block *b)
{
	for (size_t i = 0; i < b->size; i++)
		MUST(b->bytes[i] == b->value);
}

static void *churn(void *arg)
{
	unsigned seed = (unsigned)(size_t)arg;
	struct block kept[KEPT] = { 0 };
	while (!stop) {
		struct block *b = &kept[rand_r(&seed) % KEPT];
		check(b);
		free(b->bytes);
		*b = fresh(&seed);
		if (rand_r(&seed) % 4 == 0) {
			size_t more = b->size + rand_r(&seed) % 100000;
			MUST((b->bytes = realloc(b->bytes, more)));
			memset(b->bytes + b->size, b->value, more - b->size);
			b->size = more;
		}
		/* As calloc must give zeros also where memory was discarded and came back. */
		unsigned char *zeros = calloc(1, b->size);
		for (size_t i = 0; i < b->size; i++)
			MUST(zeros[i] == 0);
		free(zeros);
	}
	for (int i = 0; i < KEPT; i++)
		free(kept[i].bytes);
	return NULL;
}

static int moved(void)
{
	char line[512];
	int found = 0;
	FILE *maps = fopen("/proc/self/maps", "r");
	MUST(maps);
	while (fgets(line, sizeof line, maps))
		found |= strstr(line, "freeflow-pd") != NULL;
	fclose(maps);
	return found;
}

int main(void)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	MUST(list && list[0]);
	struct ibv_context *context = ibv_open_device(list[0]);
	MUST(context);
	struct ibv_pd *pd = ibv_alloc_pd(context);
	MUST(pd);
	pthread_t threads[THREADS];
	for (size_t i = 0; i < THREADS; i++)
		MUST(pthread_create(&threads[i], NULL, churn, (void *)(i + 1)) == 0);
	struct block live[LIVE] = { 0 };
	unsigned seed = 7;
	for (int round = 0; round < ROUNDS; round++) {
		struct block *b = &live[round % LIVE];
		check(b);
		if (b->mr)
			MUST(ibv_dereg_mr(b->mr) == 0);
		check(b);
		free(b->bytes);
		*b = fresh(&seed);
		MUST((b->mr = ibv_reg_mr(pd, b->bytes, b->size, ACCESS)));
		if (round % 100 == 50) {
			MUST(moved());
			MUST(system("true") == 0);
		}
	}
	stop = 1;
	for (int i = 0; i < THREADS; i++)
		MUST(pthread_join(threads[i], NULL) == 0);
	for (int i = 0; i < LIVE; i++) {
		MUST(ibv_dereg_mr(live[i].mr) == 0);
		check(&live[i]);
		free(live[i].bytes);
	}
	puts("kept working");
	return 0;
}
