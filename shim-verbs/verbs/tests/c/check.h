/* Shared by the test programs: a check that fails says what and where, and ends the program. */
#ifndef CHECK_H
#define CHECK_H
#include <errno.h>
#include <infiniband/verbs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(what)                                                                                    \
	do {                                                                                           \
		if (!(what)) {                                                                         \
			fprintf(stderr, "%s:%d: %s (errno %d: %s)\n", __FILE__, __LINE__, #what, errno, \
				strerror(errno));                                                      \
			exit(1);                                                                       \
		}                                                                                      \
	} while (0)

/* `call` fails as creators do: NULL and this errno. */
#define CHECK_NULL(call, error)                     \
	do {                                        \
		errno = 0;                          \
		CHECK((call) == NULL);              \
		CHECK(errno == (error));            \
	} while (0)

static inline struct ibv_context *open_first(void)
{
	int n = -1;
	struct ibv_device **list = ibv_get_device_list(&n);
	CHECK(list && n == 1 && list[0] && !list[1]);
	struct ibv_context *context = ibv_open_device(list[0]);
	CHECK(context);
	ibv_free_device_list(list);
	return context;
}
#endif
