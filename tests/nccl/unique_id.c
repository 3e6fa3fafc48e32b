/* unique_id LIBNCCL: what NCCL does before it needs a GPU. ncclGetUniqueId opens the network plugin. */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

typedef struct {
	char internal[128];
} unique_id;

/* Prints which network plugins are mapped. */
static void show_plugins(void)
{
	char line[4096];
	FILE *maps = fopen("/proc/self/maps", "r");
	while (maps && fgets(line, sizeof line, maps)) {
		char *path = strchr(line, '/');
		if (path && strstr(path, "libnccl-net"))
			printf("mapped: %s", path);
	}
	if (maps)
		fclose(maps);
}

int main(int argc, char **argv)
{
	if (argc != 2)
		return 2;
	void *nccl = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
	if (!nccl) {
		fprintf(stderr, "%s\n", dlerror());
		return 1;
	}
	int (*version)(int *) = (int (*)(int *))dlsym(nccl, "ncclGetVersion");
	int (*get)(unique_id *) = (int (*)(unique_id *))dlsym(nccl, "ncclGetUniqueId");
	if (!version || !get)
		return 1;
	int number = 0;
	unique_id id;
	printf("ncclGetVersion: %d, ", version(&number));
	printf("%d\n", number);
	printf("ncclGetUniqueId: %d\n", get(&id));
	show_plugins();
	return 0;
}
