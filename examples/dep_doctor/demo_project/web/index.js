const charts = require("example-copyleft-charts");
const lodash = require("lodash");
const request = require("request");

request("forecast.json", (error, response, body) => {
  if (!error) charts.draw(lodash.sortBy(JSON.parse(body), "day"));
});
