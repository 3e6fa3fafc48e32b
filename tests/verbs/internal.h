/* Between common.c, oob.c and pair.c only. */
#ifndef FREEFLOW_CONFORMANCE_INTERNAL_H
#define FREEFLOW_CONFORMANCE_INTERNAL_H

enum verdict { PASSED, FAILED, SKIPPED };

extern double patience; /* factor on every time limit, for emulated machines */

_Noreturn void end_case(enum verdict how, const char *why);
void oob_open(const char *client, int server_port);
/* Tells the other process that the case is over here, waits until it is over there, and returns its verdict. */
enum verdict oob_end_case(enum verdict mine);
void oob_goodbye(void);
/* True once the other process has given the case up: waiting for it is then in vain. */
bool oob_peer_gave_up(void);
void ends_destroy_all(void);

#endif
