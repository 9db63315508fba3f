#ifndef NAT_SANDBOX_H
#define NAT_SANDBOX_H
/*
 * What the NAT helper gives up before it looks at the first packet of the guest. After it, it may use the
 * sockets it has, make IPv4 and IPv6 sockets, and read /etc/resolv.conf.
 */
#include <stdbool.h>

/* Descriptors and core dumps; first thing. */
void nat_limit(void);
/*
 * Identity, capabilities, files, system calls; after ports below 1024 are bound. Each step that the host
 * does not have is left out, but for the system call filter: 0 or -errno with *what naming the step.
 */
int nat_confine(const char **what);
/* The host put another /etc/resolv.conf in place, which this process may not read. */
bool nat_resolver_lost(void);
#endif
