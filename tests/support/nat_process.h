#ifndef NAT_PROCESS_H
#define NAT_PROCESS_H
/* The real vmm-nat of this build, on a socket pair. */
#include <stdbool.h>
#include <stddef.h>
#include "guest_ip.h"
struct spawner;

struct nat_process {
	struct guest g;
	struct spawner *spawner;
	int pidfd;
	char answer[256];               /* what it said on the control socket */
};

/* Its path; false: this build has none. */
bool nat_helper(char *buf, size_t len);
void nat_start(struct nat_process *p, const char *config);
/* Close the frame socket and see it end by itself. */
void nat_stop(struct nat_process *p);
int nat_pid(const struct nat_process *p);
/* It still serves: ARP for the gateway is answered within ms. */
bool nat_alive(struct nat_process *p, int ms);
#endif
