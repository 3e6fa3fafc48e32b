/* A child forked with open objects: it may take down its copies or just exit, and the parent's go on working; it may
 * also open the device for itself. */
#include "pair.h"
#include <sys/wait.h>
#include <unistd.h>

static void exchange(struct pair *p, uint64_t wr_id)
{
	struct ibv_sge sge = { (uintptr_t)p->buffer, 64, p->mr->lkey };
	struct ibv_send_wr wr = { .wr_id = wr_id, .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_SEND,
				  .send_flags = IBV_SEND_SIGNALED }, *bad;
	sprintf(p->buffer, "message %lu", wr_id);
	post_receive(p, wr_id, 0, 64);
	CHECK(ibv_post_send(p->qp[0], &wr, &bad) == 0);
	expect(p->cq, wr_id, IBV_WC_SEND);
	expect(p->rcq, wr_id, IBV_WC_RECV);
	CHECK(!strcmp(p->buffer, p->buffer + SIZE));
}

static void wait_for(pid_t child)
{
	int status;
	CHECK(child > 0 && waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* The man page promises nothing about these calls, but they must end and leave the parent alone. */
static void take_down(struct pair *p)
{
	ibv_destroy_qp(p->qp[0]);
	ibv_destroy_qp(p->qp[1]);
	ibv_dereg_mr(p->mr);
	ibv_destroy_cq(p->cq);
	ibv_destroy_cq(p->rcq);
	ibv_destroy_comp_channel(p->channel);
	ibv_dealloc_pd(p->pd);
	ibv_close_device(p->context);
}

int main(void)
{
	struct pair p = make_pair(0, open_first(), NULL);
	exchange(&p, 1);

	pid_t child = fork();
	if (child == 0) {
		memset(p.buffer, 0xff, 2 * SIZE); /* its own copy */
		_exit(0);
	}
	wait_for(child);
	CHECK(p.buffer[0] == 'm');
	exchange(&p, 2);

	child = fork();
	if (child == 0) {
		take_down(&p);
		exit(0);
	}
	wait_for(child);
	exchange(&p, 3);

	child = fork();
	if (child == 0) {
		struct pair own = make_pair(0, open_first(), NULL);
		exchange(&own, 4);
		take_down(&p); /* the inherited objects do not come to life with it */
		exchange(&own, 6);
		free_pair(&own);
		CHECK(ibv_close_device(own.context) == 0);
		exit(0);
	}
	wait_for(child);
	exchange(&p, 5);
	struct ibv_context *context = p.context;
	free_pair(&p);
	CHECK(ibv_close_device(context) == 0);
	return 0;
}
