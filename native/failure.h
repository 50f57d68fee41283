/* What failure.c gives beside internal.h's part: to load() and to the agent. */
#ifndef UVM_FAILURE_H
#define UVM_FAILURE_H

#include "internal.h"

/* The page is tried again by the caller: its poison, or its placeholder, is taken away. No lock held;
 * waits until the service has read an event, so never in a thread that serves. */
void uvm_failure_lift(struct uvm_region *r, uint64_t index);
/* The serving process poisons the page itself: the janitor is to lift that. */
void uvm_failure_note_poison(struct uvm_region *r, uint64_t index);

void uvm_agent_child(void); /* after fork: there is no agent any more */

#endif
