//! Medians over the rounds, and how far the rounds lie apart.

use slipring_peers::json::Json;

use super::{
    round::Measured,
    rows::{Figure, Row},
};

/// The median of some figures, and the outermost ones.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    /// `None` of no figures.
    pub fn of(figures: impl Iterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = figures.filter(|figure| figure.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let median = (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0;
        Some(Self { median, min, max })
    }

    pub fn json(self) -> Json {
        Json::Object(vec![
            ("median", self.median.into()),
            ("min", self.min.into()),
            ("max", self.max.into()),
        ])
    }
}

/// One server's answer to a question.
pub struct Answer {
    pub name: &'static str,
    /// By round; empty after a failure.
    pub rounds: Vec<Measured>,
    pub failure: Option<String>,
}

/// A question with its answers; the baseline's is the first.
pub struct Answered {
    pub row: Row,
    pub answers: Vec<Answer>,
}

impl Answer {
    /// Over the rounds.
    pub fn spread(&self, figure: impl Fn(&Measured) -> f64) -> Option<Spread> {
        Spread::of(self.rounds.iter().map(figure))
    }

    /// What the question is about: nanoseconds, microseconds or bytes.
    pub fn figure(&self, figure: Figure) -> Option<Spread> {
        self.spread(|measured| value(measured, figure))
    }

    /// The ratios to another one's figures, each within a round.
    pub fn ratio(&self, other: &Self, figure: Figure) -> Option<Spread> {
        let pairs = self.rounds.iter().zip(&other.rounds);
        Spread::of(pairs.map(|(own, other)| value(own, figure) / value(other, figure)))
    }
}

impl Answered {
    /// The ratios to the baseline within each round.
    pub fn ratio(&self, answer: &Answer) -> Option<Spread> {
        answer.ratio(self.answers.first()?, self.row.figure)
    }

    pub fn failures(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.answers.iter().filter_map(|answer| Some((answer.name, answer.failure.as_deref()?)))
    }
}

fn value(measured: &Measured, figure: Figure) -> f64 {
    match figure {
        Figure::Cpu => measured.cpu_ns(),
        Figure::Latency => measured.sample.quantile_us(0.5),
        Figure::Memory => measured.bytes_each.unwrap_or(f64::NAN),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_lies_in_the_middle_whatever_the_order() {
        let spread = Spread::of([3.0, f64::NAN, 1.0, 10.0, 2.0].into_iter()).expect("four figures");
        assert_eq!((spread.median, spread.min, spread.max), (2.5, 1.0, 10.0));
        assert!(Spread::of([f64::INFINITY].into_iter()).is_none());
    }
}
