/* mpi OPERATION BYTES: the median time of one collective operation, in microseconds, as the first rank sees it. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BATCHES 31

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    double times[BATCHES];
    int rank, ranks;

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    if (argc != 3)
        MPI_Abort(MPI_COMM_WORLD, 2);
    int all_to_all = strcmp(argv[1], "alltoall") == 0;
    size_t len = strtoul(argv[2], NULL, 10);
    char *in = malloc(len * ranks), *out = malloc(len * ranks);
    int count = len >= 1 << 20 ? 5 : len >= 1 << 14 ? 50 : 500;
    memset(in, 1, len * ranks);
    memset(out, 1, len * ranks);
    /* The first batch warms up. */
    for (int batch = -1; batch < BATCHES; batch++) {
        MPI_Barrier(MPI_COMM_WORLD);
        double start = MPI_Wtime();
        for (int i = 0; i < count; i++) {
            if (all_to_all)
                MPI_Alltoall(in, (int)len, MPI_CHAR, out, (int)len, MPI_CHAR, MPI_COMM_WORLD);
            else
                MPI_Allreduce(in, out, (int)(len / 8), MPI_LONG, MPI_SUM, MPI_COMM_WORLD);
        }
        if (batch >= 0)
            times[batch] = (MPI_Wtime() - start) / count * 1e6;
    }
    qsort(times, BATCHES, sizeof(times[0]), by_value);
    if (rank == 0)
        printf("%.3f\n", times[BATCHES / 2]);
    MPI_Finalize();
    return 0;
}
