/* A library that looks like a UCX which the transport does not know (-DLIBRARY -DMARK=symbol), and a program that has the
 * transport loaded by it, as UCX's module loader would. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>

#ifdef LIBRARY
void ucs_log_dispatch(void) {}
void uct_component_register(void) {}
void MARK(void) {}

int load(const char *plugin)
{
    void *library = dlopen(plugin, RTLD_LAZY | RTLD_LOCAL);
    int (*init)(void) = library ? (int (*)(void))dlsym(library, "ucs_module_global_init") : NULL;

    if (init == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    return (signed char)init() < 0 ? 0 : 1;
}
#else
int main(int argc, char **argv)
{
    void *library = argc > 2 ? dlopen(argv[1], RTLD_LAZY) : NULL;
    int (*load)(const char *) = library ? (int (*)(const char *))dlsym(library, "load") : NULL;

    return load ? load(argv[2]) : 1;
}
#endif
