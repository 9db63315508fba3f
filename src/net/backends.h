#ifndef NET_BACKENDS_H
#define NET_BACKENDS_H
/* The back ends, for the table in net.c. */
#include "vmm/net.h"

extern const struct net_class net_fd, net_user;
#endif
