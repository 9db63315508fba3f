#ifndef CLI_CONFIG_H
#define CLI_CONFIG_H
/* argv to struct vm_config. Every error names the option. */
#include <stdbool.h>
#include "vmm/vm.h"
struct error;

#define MAX_DEVICES 64
#define MAX_FILES   32

struct run_config {
	struct vm_config vm;
	struct device_spec devices[MAX_DEVICES];
	const char *initrds[MAX_FILES], *modules[MAX_FILES];
	unsigned nr_serials;
	bool serial_given, net_given;
	int verbose;            /* -1 quiet, 0, 1, 2 */
	bool help;
};

/* The strings point into argv. 0 or -EINVAL with words. */
int config_parse(struct run_config *c, int argc, char **argv, struct error *err);
/* NAT where nothing was said of a network, if its helper is there. */
void config_default_net(struct run_config *c);
/* The table of options, as --help prints it: fits a screen. */
void config_usage(void);
#endif
