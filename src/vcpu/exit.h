#ifndef VCPU_EXIT_H
#define VCPU_EXIT_H
/* What KVM_RUN came back with. On the vCPU's own thread. */
#include <stdbool.h>
struct vcpu;

bool vcpu_handle_exit(struct vcpu *c);                  /* false: this vCPU does not run on */
void vcpu_run_failed(struct vcpu *c, int error);        /* KVM_RUN itself failed, with a positive errno */
#endif
