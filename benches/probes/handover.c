/* handover CPU CPU: microseconds until a store on one processor is seen on the other: half a round trip over two cache
 * lines, median of batches. Every round of the bench is bracketed by this. */
#include "probe.h"
#include <stdatomic.h>

enum { BATCHES = 100, TRIPS = 1000 };

struct line {
	_Alignas(128) atomic_uint word;
};

static void await(struct line *line, unsigned value)
{
	while (atomic_load_explicit(&line->word, memory_order_acquire) != value)
		;
}

int main(int argc, char **argv)
{
	MUST(argc == 3);
	struct line *lines = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	MUST(lines != MAP_FAILED);
	if (fork_pinned(atoi(argv[1]), atoi(argv[2])) == 0) {
		for (unsigned i = 1; i <= BATCHES * TRIPS; i++) {
			await(&lines[0], i);
			atomic_store_explicit(&lines[1].word, i, memory_order_release);
		}
		return 0;
	}
	double took[BATCHES];
	for (unsigned batch = 0, i = 0; batch < BATCHES; batch++) {
		double start = now();
		for (unsigned trip = 0; trip < TRIPS; trip++) {
			atomic_store_explicit(&lines[0].word, ++i, memory_order_release);
			await(&lines[1], i);
		}
		took[batch] = now() - start;
	}
	printf("%f\n", median(took, BATCHES) / TRIPS / 2 * 1e6);
	return 0;
}
