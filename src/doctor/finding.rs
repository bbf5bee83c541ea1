//! The lines of an examination, those that a configuration adds to it included.

use super::Examination;
use crate::config::{Balance, Config};
use crate::machine::{NOT_PINNED, default_cpus, pins};
use crate::spin::SpinState;

/// One line of the report.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    pub(super) area: &'static str,
    pub(super) name: &'static str,
    pub(super) found: String,
    pub(super) consequence: Option<String>,
}

impl Finding {
    pub(super) fn new(
        area: &'static str,
        name: &'static str,
        found: impl Into<String>,
        consequence: Option<impl Into<String>>,
    ) -> Finding {
        Finding { area, name, found: found.into(), consequence: consequence.map(Into::into) }
    }
}

pub(super) fn known(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "unknown".to_owned(), |value| value.to_string())
}

impl Examination {
    /// Adds what follows from a configuration: after how long a peer that has vanished is found in
    /// each state of its connection, and what is probably not meant.
    /// [`Config::explain`] says the same beside each value.
    ///
    /// # Examples
    ///
    /// ```
    /// use slipring::Config;
    ///
    /// let examination = slipring::doctor::examine().with_config(&Config::default());
    /// assert!(examination.to_string().contains("found after about 60 s"));
    /// ```
    #[must_use]
    pub fn with_config(mut self, config: &Config) -> Examination {
        let explanation = config.explain();
        let none = None::<String>;
        let facts = explanation.facts().iter().map(|(name, text)| (*name, text));
        let warnings = explanation.warnings().iter().map(|text| ("warning", text));
        let lines = facts.chain(warnings);
        self.configured = lines
            .map(|(name, text)| Finding::new("configuration", name, text, none.clone()))
            .collect();
        self.configured.extend(self.spin(config));
        if let (Ok(settings), Ok(cpus)) = (config.settings(), config.cpu_list())
            && settings.balance == Balance::Cpu
        {
            let quota = self.facts.quota_cpus;
            let allowed = self.facts.allowed_cpus.as_deref().unwrap_or_default();
            let cores = cpus.map_or_else(|| default_cpus(allowed, quota).len(), |cpus| cpus.len());
            if !pins(settings.pin, quota, cores) {
                self.configured.push(Finding::new("configuration", "warning", NOT_PINNED, none));
            }
        }
        self
    }

    /// What becomes of `SLIPRING_SPIN_US`, where it is set.
    fn spin(&self, config: &Config) -> Option<Finding> {
        let (settings, asked) = (config.settings().ok()?, config.cpu_list().ok()?);
        let allowed = self.facts.allowed_cpus.as_deref().unwrap_or_default();
        let cpus = asked.unwrap_or_else(|| default_cpus(allowed, self.facts.quota_cpus));
        let state = SpinState::judge(&settings, &self.facts, cpus.len());
        let text = (state != SpinState::Off).then(|| state.to_string())?;
        Some(Finding::new("configuration", "spinning", text, None::<String>))
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{Balance, Config};
    use crate::doctor::examine;

    #[test]
    fn a_quota_that_keeps_cores_from_being_pinned_is_told_of_where_that_matters() {
        let text = |balance, cpus: &str, quota_cpus| {
            let mut examination = examine();
            examination.facts.quota_cpus = quota_cpus;
            examination.with_config(&Config::default().balance(balance).cpus(cpus)).to_string()
        };
        let told = |text: String| text.contains("SLIPRING_BALANCE=cpu needs cores that are pinned");
        assert!(told(text(Balance::Cpu, "0-1", Some(1.5))));
        assert!(!told(text(Balance::Cpu, "0-1", Some(2.0))));
        assert!(!told(text(Balance::Cpu, "0-1", None)));
        assert!(!told(text(Balance::Hash, "0-1", Some(1.5))));
    }
}
