//! The lines of an examination, those that a configuration adds to it included.

use super::Examination;
use crate::config::Config;
use crate::machine::default_cpus;
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
