/* reg CPU new|known: registers 64 MiB of touched private memory. `new`: GB/s of ibv_reg_mr on memory never registered
 * before, median. `known`: microseconds of ibv_reg_mr on memory that another MR covers already, median. */
#include "probe.h"
#include <infiniband/verbs.h>

enum { LENGTH = 64 << 20, NEW = 7, KNOWN = 101 };
static const int ACCESS = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;

static char *touched(void)
{
	char *memory = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(memory != MAP_FAILED);
	memset(memory, 1, LENGTH);
	return memory;
}

static double timed(struct ibv_pd *pd, char *memory, struct ibv_mr **mr)
{
	double start = now();
	*mr = ibv_reg_mr(pd, memory, LENGTH, ACCESS);
	double took = now() - start;
	MUST(*mr);
	return took;
}

static double new_memory(struct ibv_pd *pd)
{
	double took[NEW];
	/* The first round warms up: memory the virtual machine has never touched is far slower. */
	for (int i = -1; i < NEW; i++) {
		char *memory = touched();
		struct ibv_mr *mr;
		double one = timed(pd, memory, &mr);
		if (i >= 0)
			took[i] = one;
		MUST(ibv_dereg_mr(mr) == 0);
		MUST(munmap(memory, LENGTH) == 0);
	}
	return LENGTH / median(took, NEW) / 1e9;
}

static double known_memory(struct ibv_pd *pd)
{
	double took[KNOWN];
	char *memory = touched();
	struct ibv_mr *first, *mr;
	timed(pd, memory, &first);
	for (int i = 0; i < KNOWN; i++) {
		took[i] = timed(pd, memory, &mr);
		MUST(ibv_dereg_mr(mr) == 0);
	}
	MUST(ibv_dereg_mr(first) == 0);
	return median(took, KNOWN) * 1e6;
}

int main(int argc, char **argv)
{
	MUST(argc == 3);
	pin(atoi(argv[1]));
	struct ibv_device **list = ibv_get_device_list(NULL);
	MUST(list && list[0]);
	struct ibv_context *context = ibv_open_device(list[0]);
	MUST(context);
	struct ibv_pd *pd = ibv_alloc_pd(context);
	MUST(pd);
	printf("%f\n", strcmp(argv[2], "new") ? known_memory(pd) : new_memory(pd));
	return 0;
}
