//! A core's mail: what goes to other cores, and hearing what other threads have sent.

use std::rc::Rc;
use std::sync::Arc;

use crate::core::CoreCell;
use crate::cores::Errand;
use crate::executor::{Scope, guarded};
use crate::post::Message;
use crate::sys::clock::coarse_ms;
use crate::sys::place::Place;
use crate::task::spawn_task;

impl CoreCell {
    /// Sends what the turn has left for other cores.
    pub(crate) fn post_mail(&self) {
        let refused = {
            let mut core = self.borrow_mut();
            if core.outbox.is_empty() {
                return;
            }
            core.outbox.deliver()
        };
        if !refused.is_empty() {
            drop_messages(refused);
            // What is dropped may wake, and nobody looks again before the core waits.
            self.borrow_mut().tasks.collect_local_wakes();
        }
    }

    /// Hears what other threads have sent, up to a budget: whoever sends faster than this reads
    /// must hold up neither the connections nor a drain.
    pub(crate) fn read_mail(self: &Rc<CoreCell>) {
        {
            let core = &mut *self.borrow_mut();
            if core.mail.is_empty() {
                core.post.mailbox.take(&mut core.mail);
            }
        }
        for _ in 0..MAIL_BUDGET {
            let Some(message) = self.borrow_mut().mail.pop_front() else { return };
            self.borrow_mut().counters.messages.add(1);
            match message {
                Message::Wake(remote) => self.borrow_mut().tasks.hear_wake(&remote),
                Message::Look => self.borrow_mut().hear_of_places(),
                Message::Inspect(question) => self.borrow_mut().inspections.push(question),
                Message::Retire(deadline_ns) => self.borrow_mut().retire_at(deadline_ns),
                Message::Steer => self.borrow_mut().put_steering_right(),
                Message::Moved(moved) => self.borrow_mut().take_over(moved),
                Message::Heard(notice) => self.borrow_mut().wake_audience(&notice),
                Message::Answer(answer) => {
                    let unwanted = self.borrow_mut().take_answer(answer);
                    if let Some(unwanted) = unwanted {
                        guarded(move || drop(unwanted));
                    }
                }
                Message::Run(place, errand) => self.run_errand(place, errand),
                Message::Spawn(place, make) => {
                    let mut refused = false;
                    let spawn = || refused = spawn_task(self, Scope::Core, place, make()).is_err();
                    if !guarded(spawn) {
                        self.borrow_mut().count_panic(place);
                    }
                    self.borrow_mut().counters.tasks_refused.add(refused.into());
                }
            }
        }
    }
}

impl CoreCell {
    /// Runs what another core has called for. It is anyone's code; a panic in it is its own.
    fn run_errand(self: &Rc<CoreCell>, place: Place, errand: Errand) {
        let counters = Arc::clone(&self.borrow_mut().counters);
        counters.calls_run.add(1);
        counters.running.set(place);
        counters.watch.poll_begins(coarse_ms());
        if !guarded(|| errand(self)) {
            self.borrow_mut().count_panic(place);
        }
        if counters.watch.poll_ends(place, coarse_ms()) {
            counters.stalls.add(1);
        }
        counters.running.clear();
    }
}

/// What messages carry is anyone's: a panic in dropping one does not keep the others from it.
pub(crate) fn drop_messages(messages: impl IntoIterator<Item = Message>) {
    for message in messages {
        guarded(move || drop(message));
    }
}

/// Messages of other threads that are heard in one turn.
const MAIL_BUDGET: usize = 256;
