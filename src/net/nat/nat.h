#ifndef NAT_NAT_H
#define NAT_NAT_H
#include "net/nat/config.h"
struct nat;

/*
 * A libslirp instance on a frame socket. Binds the forwards: their ports, in order, go to ports[]. NULL and
 * *errnum, *which (a forward, or -1) on failure.
 */
struct nat *nat_new(const struct nat_config *c, int frames, uint16_t *ports, int *errnum, int *which);
/* Carry frames until the other end of the frame socket is closed. 0, or -errno if poll() cannot go on. */
int nat_run(struct nat *n);
void nat_free(struct nat *n);
#endif
