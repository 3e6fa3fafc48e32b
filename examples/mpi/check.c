/* An MPI program that checks what it receives: messages, collectives and one-sided operations, from 8 B to 4 MiB. */
#include <mpi.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LARGEST (4u << 20)
#define WORDS (LARGEST / sizeof(long))

static int rank, ranks;

static void expect(int holds, const char *what, size_t len)
{
    if (holds)
        return;
    fprintf(stderr, "check: rank %d: %s of %zu bytes: wrong data\n", rank, what, len);
    MPI_Abort(MPI_COMM_WORLD, 1);
}

/* A message round the ring: each adds one to every word. */
static void ring(long *words)
{
    int next = (rank + 1) % ranks, before = (rank + ranks - 1) % ranks;

    for (size_t count = 1; count <= WORDS; count *= 8) {
        if (rank == 0) {
            for (size_t i = 0; i < count; i++)
                words[i] = (long)i;
            MPI_Send(words, (int)count, MPI_LONG, next, 1, MPI_COMM_WORLD);
        }
        MPI_Recv(words, (int)count, MPI_LONG, before, 1, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        long hops = rank == 0 ? ranks - 1 : rank - 1;
        for (size_t i = 0; i < count; i++) {
            expect(words[i] == (long)i + hops, "message", count * sizeof(long));
            words[i]++;
        }
        if (rank != 0)
            MPI_Send(words, (int)count, MPI_LONG, next, 1, MPI_COMM_WORLD);
    }
}

static void collectives(long *in, long *out)
{
    for (size_t count = 1; count <= WORDS / ranks; count *= 8) {
        size_t len = count * sizeof(long);
        for (size_t i = 0; i < count; i++)
            in[i] = (long)i * (rank + 1);
        MPI_Allreduce(in, out, (int)count, MPI_LONG, MPI_SUM, MPI_COMM_WORLD);
        for (size_t i = 0; i < count; i++)
            expect(out[i] == (long)i * ranks * (ranks + 1) / 2, "allreduce", len);
        for (size_t i = 0; i < count * ranks; i++)
            in[i] = rank * 1000 + (long)(i / count);
        MPI_Alltoall(in, (int)count, MPI_LONG, out, (int)count, MPI_LONG, MPI_COMM_WORLD);
        for (size_t i = 0; i < count * ranks; i++)
            expect(out[i] == (long)(i / count) * 1000 + rank, "alltoall", len);
        memset(out, rank == 0 ? 7 : 0, len);
        MPI_Bcast(out, (int)count, MPI_LONG, 0, MPI_COMM_WORLD);
        expect(((char *)out)[len - 1] == 7, "broadcast", len);
    }
}

/* Each rank puts into the next one's memory, reads the one before, and counts at rank 0. */
static void one_sided(long *scratch)
{
    int next = (rank + 1) % ranks, before = (rank + ranks - 1) % ranks;
    long one = 1, old = 0, *memory;
    MPI_Win window;

    MPI_Win_allocate((WORDS + 1) * sizeof(long), sizeof(long), MPI_INFO_NULL, MPI_COMM_WORLD, &memory, &window);
    memset(memory, 0, (WORDS + 1) * sizeof(long));
    for (size_t count = 1; count <= WORDS; count *= 8) {
        for (size_t i = 0; i < count; i++)
            scratch[i] = (long)i + 10 * rank;
        MPI_Win_fence(0, window);
        MPI_Put(scratch, (int)count, MPI_LONG, next, 0, (int)count, MPI_LONG, window);
        MPI_Win_fence(0, window);
        for (size_t i = 0; i < count; i++)
            expect(memory[i] == (long)i + 10 * before, "put", count * sizeof(long));
        MPI_Get(scratch, (int)count, MPI_LONG, next, 0, (int)count, MPI_LONG, window);
        MPI_Win_fence(0, window);
        for (size_t i = 0; i < count; i++)
            expect(scratch[i] == (long)i + 10 * rank, "get", count * sizeof(long));
    }
    MPI_Win_lock_all(0, window);
    for (int i = 0; i < 100; i++) {
        MPI_Fetch_and_op(&one, &old, MPI_LONG, 0, WORDS, MPI_SUM, window);
        MPI_Win_flush(0, window);
    }
    MPI_Win_unlock_all(window);
    MPI_Barrier(MPI_COMM_WORLD);
    if (rank == 0) {
        MPI_Win_lock(MPI_LOCK_SHARED, 0, 0, window);
        expect(memory[WORDS] == 100L * ranks, "fetch and op", sizeof(long));
        MPI_Win_unlock(0, window);
    }
    MPI_Win_free(&window);
}

/* Counters in rank 0's memory of any kind, counted up by all, in each of the ways there are. */
static void counters(long *memory, const char *what)
{
    long one = 1, old, sum;
    int small = 1, before;
    MPI_Win window;

    memset(memory, 0, 3 * sizeof(long));
    MPI_Win_create(memory, 3 * sizeof(long), 1, MPI_INFO_NULL, MPI_COMM_WORLD, &window);
    MPI_Win_lock_all(0, window);
    for (int i = 0; i < 100; i++) {
        MPI_Fetch_and_op(&one, &old, MPI_LONG, 0, 0, MPI_SUM, window);
        MPI_Fetch_and_op(&small, &before, MPI_INT, 0, sizeof(long), MPI_SUM, window);
        MPI_Win_flush(0, window);
        for (long seen = 0;; seen = old) {
            sum = seen + 1;
            MPI_Compare_and_swap(&sum, &seen, &old, MPI_LONG, 0, 2 * sizeof(long), window);
            MPI_Win_flush(0, window);
            if (old == seen)
                break;
        }
    }
    MPI_Win_unlock_all(window);
    MPI_Barrier(MPI_COMM_WORLD);
    if (rank == 0) {
        expect(memory[0] == 100L * ranks, what, sizeof(long));
        expect(*(int *)&memory[1] == 100 * ranks, what, sizeof(int));
        expect(memory[2] == 100L * ranks, what, sizeof(long));
    }
    MPI_Win_free(&window);
}

int main(int argc, char **argv)
{
    static long fixed[3];
    long local[3], *in, *out;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    in = malloc(LARGEST + 4096), out = malloc(LARGEST + 4096);
    ring(in);
    if (argc > 1 && strcmp(argv[1], "die") == 0 && rank == 1)
        raise(SIGKILL); /* for trying what becomes of the others */
    collectives(in, out);
    one_sided(in);
    counters(in, "counter on the heap");
    counters(fixed, "static counter");
    counters(local, "counter on the stack");
    free(in), free(out);
    MPI_Finalize();
    if (rank == 0)
        printf("check: %d ranks, all data right\n", ranks);
    return 0;
}
