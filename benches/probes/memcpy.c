/* memcpy CPU SIZE: GB/s of libc's memcpy from private memory into a memfd mapping, SIZE bytes to SIZE bytes as
 * perftest writes them: pages of 4 KiB, page-aligned, average over some 0.2 s. */
#include "probe.h"

int main(int argc, char **argv)
{
	MUST(argc == 3);
	pin(atoi(argv[1]));
	size_t size = strtoul(argv[2], NULL, 0);
	int fd = memfd_create("memcpy", MFD_CLOEXEC);
	MUST(fd >= 0);
	MUST(ftruncate(fd, size) == 0);
	char *from = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *to = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	MUST(from != MAP_FAILED && to != MAP_FAILED);
	MUST(madvise(from, size, MADV_NOHUGEPAGE) == 0);
	memset(from, 1, size);
	memset(to, 2, size);
	long rounds = (8l << 30) / size;
	double start = now();
	for (long i = 0; i < rounds; i++) {
		memcpy(to, from, size);
		__asm__ volatile("" ::: "memory");
	}
	printf("%f\n", (double)rounds * size / (now() - start) / 1e9);
	return 0;
}
