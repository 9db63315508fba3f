#ifndef VMM_KVM_H
#define VMM_KVM_H
/* The door to /dev/kvm. Whether KVM is there is asked of KVM, never of CPU flags. */
#include <stdbool.h>
struct error;

/* Open /dev/kvm and check its API version; -errno with the exact remedy in words. */
int kvm_open(struct error *err);
/* The capabilities no machine of ours runs without: -ENOTSUP names the first that is missing. */
int kvm_check(int kvm_fd, struct error *err);
/* Ring 0 of guests is interpreted here (the kvm_pvm module): slow, and not every instruction runs. */
bool kvm_is_software(void);
#endif
