/* eventfd CPU CPU: microseconds for two sleeping processes to wake each other once through eventfds, median. */
#include "probe.h"
#include <stdint.h>
#include <sys/eventfd.h>

enum { TRIPS = 5000 };

static void ring(int fd)
{
	uint64_t one = 1;
	MUST(write(fd, &one, sizeof one) == sizeof one);
}

static void sleep_on(int fd)
{
	uint64_t rung;
	MUST(read(fd, &rung, sizeof rung) == sizeof rung);
}

int main(int argc, char **argv)
{
	MUST(argc == 3);
	int there = eventfd(0, EFD_CLOEXEC), back = eventfd(0, EFD_CLOEXEC);
	MUST(there >= 0 && back >= 0);
	if (fork_pinned(atoi(argv[1]), atoi(argv[2])) == 0) {
		for (int i = 0; i < TRIPS; i++) {
			sleep_on(there);
			ring(back);
		}
		return 0;
	}
	static double took[TRIPS];
	for (int i = 0; i < TRIPS; i++) {
		double start = now();
		ring(there);
		sleep_on(back);
		took[i] = now() - start;
	}
	printf("%f\n", median(took, TRIPS) * 1e6);
	return 0;
}
