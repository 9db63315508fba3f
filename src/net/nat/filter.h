#ifndef NAT_FILTER_H
#define NAT_FILTER_H
/* What a frame of the guest's must look like before libslirp sees it. Pure; nothing is kept. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum nat_verdict {
	NAT_PASS,
	NAT_MALFORMED,          /* shorter than its headers say, or lengths that contradict each other */
	NAT_UNKNOWN,            /* a protocol that has no business here */
	NAT_FORBIDDEN,          /* to the host's loopback, link-local and metadata addresses */
	NAT_VERDICTS
};

/* host_allowed: 127.0.0.0/8 and ::1 are not forbidden. */
enum nat_verdict nat_filter(const uint8_t *frame, size_t len, bool host_allowed);
#endif
